"""Tree changes against the plainest model there is: a dictionary from path to content."""

from __future__ import annotations

import stat
from collections.abc import Mapping

from dulwich.objects import Blob, ShaFile, Tree
from hypothesis import example, given, settings
from hypothesis import strategies as st
from localhub.errors import StorageError
from localhub.git.tree_editor import TreeEditor, TreeEntry

paths = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map("/".join)
changes = st.lists(
    st.tuples(
        st.sampled_from(["put", "delete_file", "delete_folder", "commit"]), paths, st.binary(max_size=2)
    ),
    max_size=25,
)


class Objects(dict[str, ShaFile]):
    """Git objects in memory."""

    def add(self, obj: ShaFile) -> str:
        oid = obj.id.decode()
        self[oid] = obj
        return oid

    def load(self, oid: str) -> Mapping[str, TreeEntry]:
        tree = self[oid]
        assert isinstance(tree, Tree)
        return {item.path.decode(): TreeEntry(item.mode, item.sha.decode()) for item in tree.iteritems()}

    def files(self, oid: str, prefix: str = "") -> dict[str, str]:
        files: dict[str, str] = {}
        for name, entry in self.load(oid).items():
            if stat.S_ISDIR(entry.mode):
                below = self.files(entry.oid, f"{prefix}{name}/")
                assert below, "git knows no empty folders"
                files |= below
            else:
                files[prefix + name] = entry.oid
        return files


def expected(model: dict[str, str], kind: str, path: str, blob: str) -> dict[str, str] | None:
    """The model after a change, or None where the change does not apply."""
    inside = {name for name in model if name.startswith(path + "/")}
    if kind == "put":
        parents = {path.rsplit("/", depth)[0] for depth in range(1, path.count("/") + 1)}
        return None if inside or parents & set(model) else {**model, path: blob}
    gone = (kind == "delete_file" and {path} & set(model)) or inside
    return {name: oid for name, oid in model.items() if name not in gone} if gone else None


@given(changes)
@example([("put", "a/b", b""), ("delete_file", "a/b", b""), ("delete_folder", "a", b"")])
@example([("put", "a/b", b""), ("delete_file", "a/b", b""), ("put", "a", b"")])
@settings(max_examples=200, deadline=None)
def test_a_tree_edited_step_by_step_equals_the_dictionary(steps: list[tuple[str, str, bytes]]) -> None:
    objects = Objects()
    model: dict[str, str] = {}
    editor = TreeEditor(objects.load, objects.add(Tree()))
    for kind, path, data in steps:
        if kind == "commit":
            editor = TreeEditor(objects.load, editor.write(objects.add))
            continue
        blob = objects.add(Blob.from_string(data))
        after = expected(model, kind, path, blob)
        try:
            if kind == "put":
                editor.put(path, blob)
            elif kind == "delete_file":
                editor.delete_file(path)
            else:
                editor.delete_folder(path)
        except StorageError:
            assert after is None, (kind, path, model)
        else:
            assert after is not None, (kind, path, model)
            model = after
    assert objects.files(editor.write(objects.add)) == model
