from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dulwich import porcelain
from kernelpress.builder import write
from kernelpress.builder.build import build, prepare
from kernelpress.builder.generated import without_provenance
from kernelpress.builder.model import Build
from kernelpress.errors import BuildError, SpecError
from kernelpress.lint.sources import optional_packages
from kernelpress.spec.load import load_spec
from kernels import Metadata
from kernels._rust import Digest, DigestAlgorithm

PACKAGE = "torch-ext/demo_kernel"
ASIDE = ".build.kernelpress"


def make(root: Path, out: Path | None = None) -> Build:
    return build(load_spec(root), out)


def tree(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a directory: modes and contents."""
    return {
        path.relative_to(directory).as_posix(): (
            stat.S_IMODE(path.stat().st_mode),
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize(
    "backends", ['["cuda", "rocm", "xpu"]', '["rocm", "cuda", "xpu"]', '["cpu", "cuda"]']
)
def test_the_universal_variant_depends_on_the_kernels_that_every_backend_does(make_kernel, backends):
    root = make_kernel()
    general = 'kernel-depends = [{ repo-id = "org/shared", version = 1 }]\n'
    cuda = '[general.cuda]\nkernel-depends = [{ repo-id = "org/cuda-only", version = 1 }]\n\n'
    text = (root / "build.toml").read_text().replace('["cpu", "cuda"]', f"{backends}\n{general}")
    (root / "build.toml").write_text(text.replace("[general.hub]", f"{cuda}[general.hub]"))
    variants = {variant.name: variant for variant in make(root).variants}
    (metadata,) = (file for file in variants["torch-universal"].files if file.path == "metadata.json")
    assert json.loads(metadata.data)["kernel-depends"] == [{"repo-id": "org/shared", "version": 1}]


def test_each_backend_is_flat_and_the_universal_variant_nested(make_kernel):
    kernel = make(make_kernel())
    assert [variant.name for variant in kernel.variants] == ["torch-cpu", "torch-cuda", "torch-universal"]
    assert (kernel.directory / "torch-cpu" / "__init__.py").is_file()
    assert (kernel.directory / "torch-cuda" / "ops" / "scale.py").is_file()
    assert (kernel.directory / "torch-universal" / "demo_kernel" / "ops" / "scale.py").is_file()
    assert not (kernel.directory / "torch-universal" / "__init__.py").exists()
    assert {path.name for path in (kernel.directory / "torch-universal").iterdir()} == {
        "demo_kernel",
        "metadata.json",
    }


def test_the_loaders_parser_reads_all_that_the_metadata_says(make_kernel):
    root = make_kernel()
    extra = (
        'python-depends = ["einops"]\nupstream = "https://example.org/a"\nsource = "https://example.org/b"\n'
    )
    text = (root / "build.toml").read_text().replace("edition = 5\n", f"edition = 5\n{extra}")
    (root / "build.toml").write_text(text + 'cuda_capabilities = ["8.0"]\n')
    kernel = make(root)
    for variant, backend in zip(kernel.variants, ("cpu", "cuda", "cpu"), strict=True):
        metadata = Metadata.read_from_file(kernel.directory / variant.name / "metadata.json")
        assert metadata.id == variant.id
        assert (str(metadata.name), metadata.version, metadata.license) == ("demo-kernel", 1, "MIT")
        assert str(metadata.backend.backend_type).lower() == backend
        assert metadata.backend.archs == (["8.0"] if variant.name == "torch-cuda" else None)
        assert metadata.python_depends == ["einops"]
        assert (metadata.upstream, metadata.source) == ("https://example.org/a", "https://example.org/b")
        assert metadata.provenance.kernel_builder.version.startswith("kernelpress-")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, kernel.directory / variant.name))


def test_the_digest_is_the_sha256_of_every_file_but_the_metadata(make_kernel):
    kernel = make(make_kernel())
    written = kernel.directory / "torch-universal"
    digest = json.loads((written / "metadata.json").read_bytes())["digest"]
    assert digest["algorithm"] == "sha256"
    assert digest["files"] == {
        path.relative_to(written).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in written.rglob("*")
        if path.is_file() and path != written / "metadata.json"
    }


def test_each_variant_has_a_namespace_of_its_own(make_kernel):
    kernel = make(make_kernel())
    assert [variant.id for variant in kernel.variants] == [
        f"_demo_kernel_{name}_{kernel.content_hash}" for name in ("cpu", "cuda", "universal")
    ]
    for variant in kernel.variants:
        files = {file.path.rpartition("/")[2]: file.data.decode() for file in variant.files}
        assert f'"{variant.id}::twice"' in files["twice.py"]
        assert f"torch.ops.{variant.id}.twice" in files["twice.py"]
        assert f"ops = torch.ops.{variant.id}\n" in files["_ops.py"]


def test_cann_variants_stand_where_the_loader_looks(make_kernel):
    root = make_kernel()
    (root / "build.toml").write_text((root / "build.toml").read_text().replace('"cuda"', '"cann"'))
    kernel = make(root)
    assert [variant.name for variant in kernel.variants] == ["torch-cpu", "torch-npu", "torch-universal"]
    assert (
        str(Metadata.read_from_file(kernel.directory / "torch-npu" / "metadata.json").backend.backend_type)
        == "cann"
    )


@pytest.mark.parametrize(
    ("backends", "pyproject", "stand_in"),
    [
        (["cuda", "cpu"], None, "cpu"),
        (["xpu", "rocm", "cuda"], None, "xpu"),
        (["rocm"], None, None),
        (["cuda", "rocm", "metal"], None, None),
        (["rocm"], "[tool.kernelpress]\nuniversal = true\n", "rocm"),
        (["rocm"], "[tool.kernelpress]\nuniversal = false\n", None),
        (["rocm"], "[tool.other]\n", None),
        (["rocm"], "no TOML", None),
    ],
)
def test_a_tree_for_every_machine_is_built_where_the_backends_cover_them_or_it_is_asked_for(
    make_kernel, backends, pyproject, stand_in
):
    root = make_kernel(**{"pyproject.toml": pyproject})
    build_toml = (root / "build.toml").read_text().replace('["cpu", "cuda"]', json.dumps(backends))
    (root / "build.toml").write_text(build_toml)
    directory = make(root).directory
    assert {path.name for path in directory.glob("torch-*")} - {f"torch-{name}" for name in backends} == (
        set() if stand_in is None else {"torch-universal"}
    )
    if stand_in is not None:
        metadata = Metadata.read_from_file(directory / "torch-universal" / "metadata.json")
        assert str(metadata.backend.backend_type).lower() == stand_in


@pytest.mark.parametrize(
    ("backends", "depends"), [('"cuda"', ["nvidia-cutlass-dsl"]), ('"cuda", "rocm"', [])]
)
def test_a_tree_for_every_machine_needs_what_all_backends_need(make_kernel, backends, depends):
    root = make_kernel(**{"pyproject.toml": "[tool.kernelpress]\nuniversal = true\n"})
    build_toml = (root / "build.toml").read_text().replace('"cpu", "cuda"', backends)
    build_toml += '[general.cuda]\npython-depends = ["nvidia-cutlass-dsl"]\n'
    (root / "build.toml").write_text(build_toml)
    directory = make(root).directory
    assert Metadata.read_from_file(directory / "torch-universal" / "metadata.json").python_depends == depends


@pytest.mark.parametrize(
    ("table", "message"), [("universal = 1", "must be true or false"), ("univ = 1", "unknown key")]
)
def test_a_wrong_table_beside_a_build_toml_is_refused(make_kernel, table, message):
    root = make_kernel(**{"pyproject.toml": f"[tool.kernelpress]\n{table}\n"})
    with pytest.raises(SpecError, match=message):
        make(root)


BUILD = (
    "import os, sys; from pathlib import Path\n"
    "os.umask(int(sys.argv[1], 8))\n"
    "from kernelpress.spec.load import load_spec; from kernelpress.builder.build import build\n"
    "made = build(load_spec(Path(sys.argv[2]))); print(made.tree_hash)\n"
)


def test_a_build_is_the_same_whatever_the_directory_time_umask_locale_or_hash_seed(make_kernel):
    roots = [make_kernel("one"), make_kernel("second/and/longer")]
    for path in roots[1].rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    hashes = []
    for root, umask, seed, locale, zone in zip(
        roots, ("022", "077"), ("1", "2"), ("C", "tr_TR.UTF-8"), ("UTC", "Asia/Tokyo"), strict=True
    ):
        environment = os.environ | {"PYTHONHASHSEED": seed, "LC_ALL": locale, "TZ": zone, "USER": f"u{seed}"}
        command = [sys.executable, "-c", BUILD, umask, str(root)]
        process = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        hashes.append(process.stdout)
    assert tree(roots[0] / "build") == tree(roots[1] / "build")
    assert hashes[0] == hashes[1]
    assert {mode for path, (mode, _) in tree(roots[0] / "build").items() if path.endswith(".py")} == {0o644}


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 3"),
        (f"{PACKAGE}/ops/scale.py", "scaled", "scaled!"),
        ("build.toml", "version = 1", "version = 2"),
        ("build.toml", '"MIT"', '"Apache-2.0"'),
        ("build.toml", ', "cuda"', ""),
        ("build.toml", "edition = 5", 'edition = 5\npython-depends = ["einops"]'),
    ],
)
def test_whatever_ships_changes_the_content_hash(make_kernel, path, old, new):
    root = make_kernel()
    before = make(root)
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))
    after = make(root)
    assert (before.content_hash, before.tree_hash) != (after.content_hash, after.tree_hash)
    assert before.variants[0].id != after.variants[0].id


def test_a_commit_changes_provenance_alone(make_kernel):
    root = make_kernel()
    before = make(root)
    old = {file.path: file.data for file in before.variants[0].files}
    porcelain.init(str(root))
    porcelain.add(
        str(root), [str(path) for path in root.rglob("*") if path.is_file() and ".git" not in path.parts]
    )
    head = porcelain.commit(str(root), message=b"x", author=b"A <a@b>", committer=b"A <a@b>").decode()
    after = make(root)
    new = {file.path: file.data for file in after.variants[0].files}
    assert (before.content_hash, before.tree_hash) == (after.content_hash, after.tree_hash)
    assert {path for path in old if old[path] != new[path]} == {"metadata.json"}
    assert without_provenance(old["metadata.json"]) == without_provenance(new["metadata.json"])
    provenance = Metadata.from_bytes(new["metadata.json"]).provenance
    assert (provenance.kernel.commit, provenance.kernel.dirty) == (head, False)


def test_a_second_build_takes_stale_files_away_and_leaves_foreign_ones(make_kernel):
    root = make_kernel()
    kernel = make(root)
    (kernel.directory / "publish-report.json").write_text("{}")
    (kernel.directory / "notes").mkdir()
    (kernel.directory / "notes" / "a.txt").write_text("a")
    (kernel.directory / "torch-cpu" / "stale.py").write_text("")
    (root / PACKAGE / "ops" / "common.py").write_text("DEFAULT = 3.0\nMORE = 1\n")
    (root / "build.toml").write_text((root / "build.toml").read_text().replace(', "cuda"', ""))
    make(root)
    assert {path.name for path in kernel.directory.iterdir()} == {
        "torch-cpu", "torch-universal", "publish-report.json", "notes"
    }  # fmt: skip
    assert (kernel.directory / "notes" / "a.txt").read_text() == "a"
    assert not (kernel.directory / "torch-cpu" / "stale.py").exists()
    assert not list(root.glob("build.*[!l]")), "nothing is left beside the build"


def test_sources_that_cannot_ship_leave_the_previous_build(make_kernel):
    root = make_kernel()
    before = tree(make(root).directory)
    (root / PACKAGE / "twice.py").write_text("def f(:\n")
    with pytest.raises(Exception, match="syntax error"):
        make(root)
    assert tree(root / "build") == before


def test_a_disk_without_room_leaves_the_previous_build(make_kernel):
    root = make_kernel()
    before = tree(make(root).directory)
    # In this file system call a limit stands in for the disk: it fails a write in the middle, as a full one does.
    big = f"X = '{'x' * 50_000}'\n"
    (root / PACKAGE / "ops" / "common.py").write_text(f"DEFAULT = 3.0\n{big}")
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from kernelpress.errors import BuildError\n"
        "from kernelpress.spec.load import load_spec; from kernelpress.builder.build import build\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: build(load_spec(Path(sys.argv[1])))\n"
        "except BuildError as error: print('refused', error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True
    )
    assert process.stdout.startswith("refused")
    assert "File too large" in process.stdout
    assert tree(root / "build") == before
    assert [path.name for path in root.iterdir() if path.name.startswith("build.")] == ["build.toml"]


def test_a_file_in_place_of_the_build_directory_is_refused(make_kernel):
    root = make_kernel()
    (root / "build").write_text("mine")
    with pytest.raises(BuildError, match="in the way"):
        make(root)
    assert (root / "build").read_text() == "mine"


def test_a_file_in_place_of_a_variant_is_refused(make_kernel):
    root = make_kernel()
    (root / "build").mkdir()
    (root / "build" / "torch-cpu").write_text("mine")
    with pytest.raises(BuildError, match="in the way"):
        make(root)
    assert [path.name for path in (root / "build").iterdir()] == ["torch-cpu"]


def test_a_build_killed_at_any_moment_leaves_a_whole_build_and_the_next_one_cleans_up(make_kernel):
    root = make_kernel()
    builds = {make(root).content_hash}
    code = (
        "import sys; from pathlib import Path\n"
        "from kernelpress.spec.load import load_spec; from kernelpress.builder.build import build\n"
        "spec = load_spec(Path(sys.argv[1])); source = spec.package_dir / 'ops' / 'common.py'\n"
        "for number in range(100000):\n"
        "    source.write_text(f'DEFAULT = 3.0\\nN = {number}\\n'); build(spec)\n"
        "    if number == 0: print('built', flush=True)\n"
    )
    # Each is killed so long after the end of its first build, however slow this machine is.
    for delay in (0.02, 0.05, 0.09, 0.14, 0.2):
        process = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        # Between its two renames the previous build stands beside; the next build puts it back.
        directory = root / "build" if (root / "build").is_dir() else root / ASIDE / "old"
        for variant in directory.iterdir():
            metadata = Metadata.read_from_file(variant / "metadata.json")
            metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
            builds.add(metadata.id.rpartition("_")[2])
    assert len(builds) > 1, "no build was done before it was killed"
    make(root)
    assert {path.name for path in root.iterdir()} == {"build", "build.toml", "torch-ext"}


def test_the_next_build_puts_back_what_was_set_aside_when_one_was_killed(make_kernel):
    root = make_kernel()
    directory = make(root).directory
    (directory / "publish-report.json").write_text("{}")
    (root / ASIDE / "new").mkdir(parents=True)
    (root / ASIDE / write._MARK).write_text(write._MARK_TEXT)
    directory.rename(root / ASIDE / "old")
    make(root)
    assert (directory / "publish-report.json").read_text() == "{}"
    assert {path.name for path in root.iterdir()} == {"build", "build.toml", "torch-ext"}


def test_what_a_user_keeps_beside_a_build_is_never_removed(make_kernel):
    root = make_kernel()
    make(root)
    for name in ("build.old", "build.tmp-mine", ".build.mine"):
        (root / name).mkdir()
        (root / name / "notes.txt").write_text("mine")
    (root / PACKAGE / "twice.py").write_text((root / PACKAGE / "twice.py").read_text() + "# more\n")
    make(root)
    for name in ("build.old", "build.tmp-mine", ".build.mine"):
        assert (root / name / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("mark", [None, "something else"])
def test_a_directory_of_the_builds_own_name_without_its_mark_is_in_the_way(make_kernel, mark):
    root = make_kernel()
    (root / ASIDE / "old").mkdir(parents=True)
    if mark is not None:
        (root / ASIDE / write._MARK).write_text(mark)
    with pytest.raises(BuildError, match=r"\.build\.kernelpress: this is in the way"):
        make(root)
    assert (root / ASIDE / "old").is_dir()


@pytest.mark.parametrize("length", [None, 0, 9])
def test_a_build_killed_before_it_left_its_mark_is_no_matter(make_kernel, length):
    root = make_kernel()
    (root / ASIDE).mkdir()
    if length is not None:
        (root / ASIDE / write._MARK).write_text(write._MARK_TEXT[:length])
    make(root)
    assert not (root / ASIDE).exists()


def test_builds_at_once_in_one_place_take_turns(make_kernel):
    root = make_kernel()
    code = BUILD + "for _ in range(30): build(load_spec(Path(sys.argv[2])))\n"
    command = [sys.executable, "-c", code, "022", str(root)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    assert {path.name for path in root.iterdir()} == {"build", "build.toml", "torch-ext"}
    for variant in (root / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


TWO_BUILDS = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
kernels = [get_local_kernel(Path(path)) for path in sys.argv[1:]]
for kernel in kernels:
    print(kernel.twice(torch.ones(1)).item(), kernel.scale(torch.ones(1)).item(), kernel.label())
for kernel in reversed(kernels):
    print(kernel.__name__)
"""


def test_two_builds_in_one_process_call_their_own_operators(make_kernel, run_clean):
    first = make(make_kernel("one"))
    second_root = make_kernel("two")
    path = second_root / PACKAGE / "twice.py"
    path.write_text(path.read_text().replace("FACTOR = 2", "FACTOR = 20"))
    second = make(second_root)
    variants = [
        first.directory / "torch-cpu",
        second.directory / "torch-cpu",
        second.directory / "torch-universal",
    ]
    process = run_clean(TWO_BUILDS, *map(str, variants))
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[:3] == [
        "2.0 3.0 demo_kernel::twice", "20.0 3.0 demo_kernel::twice", "20.0 3.0 demo_kernel::twice"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    [
        "__import__('', globals(), locals(), ['scale'], 1)",
        "importlib.import_module('', 'numpy')",
        "importlib.import_module('.scale', __package__)",
        "importlib.import_module('.' + str(name), __name__)",
    ],
)
@pytest.mark.parametrize(
    "place", ["{}", "def load(name):\n    return {}", "try:\n    {}\nexcept ImportError: ..."]
)
def test_a_module_without_a_name_is_no_other_package(make_kernel, statement, place):
    text = f"import importlib\nname = 'scale'\n{place.format(statement)}\n"
    kernel = prepare(load_spec(make_kernel(**{f"{PACKAGE}/ops/__init__.py": text})))
    assert optional_packages(kernel.outside, kernel.spec) == ()
    assert [finding for finding in kernel.findings if finding.code == "KP303"] == []


def test_a_build_does_not_import_torch(make_kernel):
    code = BUILD + "print('torch' in sys.modules)\n"
    process = subprocess.run(
        [sys.executable, "-c", code, "022", str(make_kernel())], capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines()[-1] == "False"
