"""The catalogue of rules: codes, severities, reasons, and how to meet each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from kernelpress.errors import CheckError
from kernelpress.findings.model import Severity


@dataclass(frozen=True)
class Rule:
    """A demand: its code, the gravest severity of its findings, a title, the reason, and how to meet it."""

    code: str
    severity: Severity
    title: str
    why: str
    fix: str


def explain(code: str) -> Rule:
    """The rule of a code, whatever its case.

    Raises:
        CheckError: There is none.
    """
    rule = RULES.get(code.upper())
    if rule is None:
        near = difflib.get_close_matches(code.upper(), RULES, n=3, cutoff=0.5)
        hint = f"; near it are {', '.join(near)}" if near else f"; known are {', '.join(RULES)}"
        raise CheckError(f"there is no rule {code!r}{hint}")
    return rule


_ALL = (
    Rule(
        "KP001",
        "error",
        "the kernel's description holds",
        "build.toml, or [tool.kernelpress] in pyproject.toml, names the kernel, its version, licence, backends and "
        "dependencies. The Kernel Hub's own parser has the last word on it, the name must be one the loader takes, "
        "the licence an SPDX identifier, and a kernel may depend only on the packages of upstream's list, since "
        "whoever loads it cannot install others.",
        "Correct the line that the message names; `kernelpress migrate` brings older editions up to date.",
    ),
    Rule(
        "KP002",
        "error",
        "the sources are files that can ship",
        "Every source must be readable UTF-8 that Python can parse, nested no more than 200 deep, a regular file "
        "within the package, and named unlike anything the build writes itself. A symbolic link that leaves the "
        "package would ship a file that nobody meant to publish.",
        "Correct, move or rename the file that the message names.",
    ),
    Rule(
        "KP101",
        "error",
        "metadata.json parses with the loader's parser",
        "The loader reads metadata.json before anything else and refuses a kernel without a name, an id, a version, "
        "a licence, the list of dependencies and a backend that it knows. The same parser is asked here.",
        "Run `kernelpress build` again, and do not edit metadata.json by hand.",
    ),
    Rule(
        "KP102",
        "error",
        "the files are those that the digest names",
        "metadata.json holds the SHA-256 of each file of its variant. A file that was changed, added or lost after "
        "the build makes the loader's verification fail for whoever asks for it.",
        "Run `kernelpress build` again.",
    ),
    Rule(
        "KP103",
        "error",
        "no bytecode, symbolic links or hidden files",
        "Bytecode belongs to one version of Python and hides what the sources say, symbolic links are not kept by "
        "the Hub, and hidden files are left by editors and tools. None of them may ship.",
        "Run `kernelpress build` again; it leaves all of these behind.",
    ),
    Rule(
        "KP104",
        "error",
        "no secrets",
        "What is published is public and stays in the repository's history. Tokens of the Hub, cloud keys and "
        "private keys have forms that are easily told, and are looked for.",
        "Take the secret out of the source, revoke it, and read it from the environment at run time instead.",
    ),
    Rule(
        "KP105",
        "warning",
        "no paths of the author's machine",
        "A path below a home directory works on one machine only, and names its user.",
        "Make the path relative to the module (`Path(__file__).parent`), or let the caller give it.",
    ),
    Rule(
        "KP106",
        "error",
        "no binaries and no large files",
        "A kernel of Python and Triton sources has no use for compiled objects, and its users download every file. "
        "A file over 1 MB is most likely data that belongs into a repository of its own.",
        "Leave the file out (see `pyext`), or load the data from where it belongs.",
    ),
    Rule(
        "KP107",
        "error",
        "no two names that differ in case alone",
        "On Windows and macOS such files are one, so that whoever downloads the kernel gets only one of them.",
        "Rename one of the files.",
    ),
    Rule(
        "KP108",
        "error",
        "the build is of these sources",
        "What is checked in build/ is what `kernelpress build` last wrote there. If the sources or build.toml have "
        "changed since, nothing that is found in it, or not found, holds for them.",
        "Run `kernelpress build`, then `kernelpress check`.",
    ),
    Rule(
        "KP201",
        "error",
        "each variant loads in a clean process",
        "Each variant is loaded by the `kernels` loader in a process of its own that has nothing of the project on "
        "its path, no network, no tokens and an empty home. What fails there fails for every user. That needs PyTorch; "
        "an environment without it is named once.",
        "Mend the source line that the message names, then build again; or install PyTorch.",
    ),
    Rule(
        "KP202",
        "error",
        "the package says what is public, and all of it is there",
        "`__all__` of the package is the contract of a version: it is what the card lists and what later builds are "
        "compared with. Each of its names must be there once the kernel is loaded.",
        "List the public names in `__all__` of the package's __init__.py, and define each of them.",
    ),
    Rule(
        "KP203",
        "error",
        "operators are registered under the build's own namespace alone",
        "PyTorch's operators are global to the process. Under a namespace that two builds share, the second one to "
        "load fails, or calls the first one's code.",
        "Register operators through torch.library with the name written out, so that the build can rename it.",
    ),
    Rule(
        "KP204",
        "warning",
        "the package loads without Triton",
        "A kernel that names the cpu backend may be loaded where Triton is not installed. A module that imports it "
        "at its top takes the whole package down there.",
        "Import Triton, and the modules of Triton kernels, where they are first called.",
    ),
    Rule(
        "KP205",
        "error",
        "importing changes nothing for the caller",
        "Whoever loads a kernel does not expect that it sets environment variables, changes settings of Python, of "
        "PyTorch or of its compilers, seeds random numbers, replaces functions of PyTorch, writes files outside of the "
        "usual caches, starts processes or threads, opens connections or prints. What the modules do that a kernel "
        "imports is left out, as far as importing them without the kernel does the same; and a warning is no output. "
        "Where something is found, the kernel is loaded once more, statement by statement, to name the line.",
        "Move it into a function that the caller calls, or do without it.",
    ),
    Rule(
        "KP206",
        "error",
        "two builds load in one process and run their own code",
        "A process may hold two versions of a kernel, each used by another library. So a variant and another build "
        "of it, which differs in its id and a line of each module, are loaded together. Each must register the same "
        "operators in its own namespace, made of its own Python functions as far as PyTorch keeps them. Each operator "
        "that made-up arguments fit (see KP207) is then called in both: all code below the two builds that runs must "
        "be its own build's, and both must fare alike. What only a call of a Python function, a GPU or other arguments "
        "reaches is not looked at.",
        "Look for state outside of the package: a registry of another library, a file, a name in `sys.modules`.",
    ),
    Rule(
        "KP207",
        "warning",
        "operators can be traced with fake tensors",
        "torch.compile runs an operator on tensors without data to learn the shapes of its results. An operator "
        "that has no such implementation breaks the graph or fails. The others are called: arguments are made up from "
        "the schema (small tensors of zeros, of as many dimensions as turn out to fit), the fake implementation is run "
        "on them, then the operator itself on the CPU, and the shapes and dtypes are compared. It is a warning if "
        "the fake implementation fails for a reason that no other arguments would mend: an unknown name, another "
        "number of arguments than the schema's, a look at data. It is a note if nothing that was tried fits, so that "
        "the implementation was not run; if the operator itself was not; or if the two agree on no arguments that "
        "both take, which may be the arguments' fault. Where variants differ in their ids alone, the first is called.",
        "Mend the implementation by `torch.library.register_fake`, or add one. Where a note says that it was not run, "
        "call it in a test with `torch.library.opcheck` and real arguments.",
    ),
    Rule(
        "KP208",
        "warning",
        "what is public is documented",
        "The card shows the first line of each public function's docstring; for users of the Hub it is often the "
        "only documentation there is.",
        "Write a docstring.",
    ),
    Rule(
        "KP301",
        "error",
        "the syntax is valid for Python 3.10",
        "The loader supports Python 3.10 and later, and a kernel is one set of sources for all of them. Newer "
        "syntax fails for users of the oldest.",
        "Write it as Python 3.10 can read it.",
    ),
    Rule(
        "KP302",
        "error",
        "modules of the project ship, or are not imported",
        "A kernel is loaded from a directory of its own, without the project that it was taken from. Modules "
        "outside of the package are therefore not there, unless they are listed to ship with it.",
        "List the module's file in `include` (or give --include), or do without the import.",
    ),
    Rule(
        "KP303",
        "error",
        "other packages are declared",
        "Beyond PyTorch, Triton and the standard library, a kernel may import only what its `python-depends` names. "
        "An import that is caught where it fails, or that happens inside a function, is an optional integration: "
        "allowed, and listed by `kernelpress build`.",
        "Name the package in `python-depends` if upstream's list has it; else import it inside the function that "
        "needs it, or under `try` with `except ImportError`.",
    ),
    Rule(
        "KP304",
        "error",
        "names of operators can be read from the source",
        "The build gives operators a namespace of their own by rewriting their names. It follows a name through "
        "variables that are assigned once, constants that begin a name (`f\"{NS}::op\"`), imports within the package, "
        "functions that hand a parameter on to torch.library, and variables that stand for `torch.ops`. It cannot "
        "follow a name that is only known when the code runs or taken out of a table, nor `torch.ops` handed on as a "
        "value, nor a constant that names a namespace here and something else there. Text that names an operator and "
        "is no such name, a pattern or code with one included, and a namespace that is compared or looked up, written "
        "there or held by a variable or a container, is a warning: it stays, and is another name than the operator's "
        "in the build. So is a variable with an operator's name that is a key or text as well: it changes there, too.",
        'Write `"namespace::operator"` out, give the operator itself, or use add_op_namespace_prefix from ._ops.',
    ),
    Rule(
        "KP305",
        "error",
        "imports of the project can be followed",
        "A kernel has another name than the package it is made of, so `import_module`, `sys.modules` or "
        "`importlib.resources` with a name put together at run time look for a module that is not there. A name that "
        "the build cannot read at all is a warning, as it may well be of another package; so is a name of the package "
        "in a text of code, a comparison with `__name__`, or what is patched or looked up by its dotted name.",
        'Import by a statement, by importlib.import_module("its.name"), or by a name that starts with {__name__}.',
    ),
    Rule(
        "KP306",
        "error",
        "operators of several namespaces differ in name",
        "All namespaces of the package become a single one in the build, so two operators of one name would "
        "collide there, and so would two libraries of kind DEF, of which PyTorch allows one for a namespace. An "
        "operator whose name or library is only known when the code runs may be such a one.",
        'Rename one of the operators; make all libraries but one a "FRAGMENT".',
    ),
    Rule(
        "KP307",
        "warning",
        "modules do not import each other in a circle at load",
        "Whether a circle of imports works depends on which of its modules is imported first; and in a kernel that "
        "may be another one than in place. Circles through a package's own `__init__`, which always comes first, are "
        "left out.",
        "Move what both need into a third module, or import inside the function.",
    ),
    Rule(
        "KP401",
        "error",
        "Triton kernels compile ahead of time",
        "A Triton kernel with a compile specification is compiled for the architectures that it names, which needs "
        "no GPU and shows errors, spills and shared memory over the limit before a user meets them.",
        "Mend the kernel or its specification.",
    ),
)  # fmt: skip

RULES = {rule.code: rule for rule in _ALL}


def page() -> str:
    """All rules as a page of Markdown."""
    lines = [
        "# Rules",
        "",
        "What `kernelpress check` looks for. `kernelpress explain KP103` prints one of these. This page is made by",
        "`python -m kernelpress.findings.rules > docs/publishing/rules.md`.",
    ]
    for rule in _ALL:
        lines += [
            "",
            f"## {rule.code}: {rule.title}",
            "",
            f"*{rule.severity}*. {rule.why}",
            "",
            f"**Fix**: {rule.fix}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
