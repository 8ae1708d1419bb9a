"""The house: who imports whom, how long files are, and whether README and docs/ speak of what is there.

Each check is a function from texts to a list of complaints. It is tried on the repository, and on made-up texts, where
it must complain.
"""

import ast
import graphlib
import posixpath
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCES = {path.stem: path.read_text() for path in sorted(REPO.glob("*.py"))}
TESTS = {path.stem: path.read_text() for path in sorted((REPO / "tests").glob("*.py"))}
PAGES = {str(p.relative_to(REPO)): p.read_text() for p in sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md")])}

SCRIPTS = {"simipu", "moco", "finetune_depth", "finetune_det3d", "finetune_mono3d", "data_check"}
SCRIPTS |= {"eval", "ablate", "bench"}
MAY_IMPORT = {
    name: SCRIPTS for name in ("eval", "ablate", "bench", "bench_ops", "bench_step")
}  # by file; all others, no script
MAY_IMPORT |= {"moco": {"simipu"}}  # networks are in encoders.py, for all others
ALSO_A_COMMAND = {"synthetic", "data_waymo"}  # can be started, but is there to be imported

COLUMNS, CODE_LINES = 120, 800
PAGE_LINES = {"README.md": 230, "CONTRIBUTING.md": 60}


# -----------------------------------------------------------------------------
# imports


def imports_of(source):
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def graph_of(sources):
    """{module: the modules of the house that it imports}."""
    return {module: imports_of(source) & sources.keys() for module, source in sources.items()}


def circles(graph):
    """The first circle found, as one line."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        return [" <- ".join(e.args[1])]
    return []


def imported_scripts(graph):
    """Scripts that are imported by a file that may not."""
    wrong = []
    for module, imported in graph.items():
        forbidden = imported & SCRIPTS - MAY_IMPORT.get(module, set())
        wrong += [f"{module}.py imports the script {script}.py" for script in sorted(forbidden)]
    return wrong


def hidden_imports(sources):
    """Functions that import files of the house."""
    wrong = []
    for module, source in sources.items():
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        wrong += [f"{module}.py: {f.name}" for f in functions if imports_of(ast.unparse(f)) & sources.keys()]
    return wrong


def unlisted_commands(sources):
    """Files that can be started, but stand in no table above."""
    starts = {module for module, source in sources.items() if '__name__ == "__main__"' in source}
    return sorted(starts - SCRIPTS - ALSO_A_COMMAND)


def test_no_circle_of_imports():
    assert circles(graph_of(SOURCES)) == []
    assert hidden_imports(SOURCES) == []


def test_a_circle_is_found_inside_functions_too():
    sources = {"a": "import b", "b": "import os\ndef f():\n    from c import g", "c": "import a.x\nimport a"}
    assert hidden_imports(sources) == ["b.py: f"]
    graph = graph_of(sources)
    assert graph == {"a": {"b"}, "b": {"c"}, "c": {"a"}}
    assert sorted(circles(graph)[0].split(" <- ")[1:]) == ["a", "b", "c"]
    assert circles({**graph, "c": set()}) == []


def test_scripts_are_imported_by_those_that_may():
    assert imported_scripts(graph_of(SOURCES)) == []
    assert unlisted_commands(SOURCES) == []


def test_an_imported_script_is_found():
    graph = {"loop": {"simipu"}, "moco": {"simipu", "eval"}, "bench": {"simipu", "eval"}, "eval": {"loop"}}
    assert imported_scripts(graph) == ["loop.py imports the script simipu.py", "moco.py imports the script eval.py"]
    assert unlisted_commands({"new": 'if __name__ == "__main__":\n    main()', "loop": ""}) == ["new"]


# -----------------------------------------------------------------------------
# size, names, syntax


def too_long(texts, most):
    """most: {name: lines}; what has no limit has no place there."""
    lines = {name: len(texts[name].splitlines()) for name in most}
    return [f"{name}: {lines[name]} lines, of {most[name]}" for name in most if lines[name] > most[name]]


def too_wide(texts, columns):
    rows = [(f"{name}:{i}", row) for name, text in texts.items() for i, row in enumerate(text.splitlines(), 1)]
    return [f"{place}: {len(row)} columns" for place, row in rows if len(row) > columns]


def nameless_tests(tests, modules):
    """Test files that are named after no module: test_<module> or test_<module>_<part>."""
    named = [re.compile(rf"test_{module}(_\w+)?$") for module in modules]
    return [test for test in tests if not any(pattern.match(test) for pattern in named)]


def newer_syntax(sources):
    """What Python 3.10 cannot parse. (Nested quotes in f-strings, which came with 3.12, only an older Python finds.)"""
    wrong = []
    for name, source in sources.items():
        try:
            tree = ast.parse(source, feature_version=(3, 10))
        except SyntaxError as e:
            wrong.append(f"{name}:{e.lineno}: {e.msg}")
            continue
        for node in ast.walk(tree):  # what the parser lets pass, whatever the version
            if isinstance(node, ast.Subscript):
                starred = any(isinstance(index, ast.Starred) for index in getattr(node.slice, "elts", []))
            else:
                starred = isinstance(getattr(node, "annotation", None), ast.Starred)
            if starred:
                wrong.append(f"{name}:{node.lineno}: a star in an index or an annotation")
    return wrong


def test_files_are_short_and_narrow():
    code = {f"{name}.py": source for name, source in SOURCES.items()}
    code |= {f"tests/{name}.py": source for name, source in TESTS.items()}
    assert too_long(code, dict.fromkeys(code, CODE_LINES)) == []
    assert too_long(PAGES, PAGE_LINES) == []
    assert too_wide(code | PAGES, COLUMNS) == []


def test_a_long_file_and_a_wide_line_are_found():
    texts = {"a": "x\n" * 4, "b": "x\n" * 3 + "y" * 9, "c": "y" * 8}
    assert too_long(texts, {"a": 3, "b": 4}) == ["a: 4 lines, of 3"]
    assert too_wide(texts, 8) == ["b:4: 9 columns"]


def test_test_files_are_named_after_what_they_test():
    assert nameless_tests(TESTS.keys() - {"conftest", "test_house"}, SOURCES) == []


def test_a_nameless_test_file_is_found():
    tests = ["test_loop", "test_loop_kills", "test_loops", "test_kills", "loop_test"]
    assert nameless_tests(tests, ["loop", "data"]) == ["test_loops", "test_kills", "loop_test"]


def test_python_3_10_can_parse_every_file():
    assert newer_syntax(SOURCES | TESTS) == []


@pytest.mark.parametrize("code", ["x[*i]", "x[*i, 0]", "def f(*x: *T): pass", "try: pass\nexcept* E: pass", "f'''{'"])
def test_newer_syntax_is_found(code):
    assert len(newer_syntax({"old": "match x:\n    case [*y]: f(*y)", "new": code})) == 1


# -----------------------------------------------------------------------------
# gradients


def differentiable_twice(sources):
    """autograd.Functions whose backward may be differentiated again, as if it were made of torch's own operations."""
    wrong = []
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
            if not any(base.endswith("autograd.Function") for base in bases):
                continue
            backward = next(f for f in node.body if getattr(f, "name", "") == "backward")
            decorators = [ast.unparse(decorator) for decorator in backward.decorator_list]
            if not any(decorator.endswith("once_differentiable") for decorator in decorators):
                wrong.append(f"{module}.py: {node.name}")
    return wrong


def test_second_derivatives_are_errors():
    """They would be silently wrong: kernels, in-place sums and collectives are constants to autograd."""
    assert differentiable_twice(SOURCES) == []


def test_a_function_that_is_differentiable_twice_is_found():
    source = "class {}(torch.autograd.Function):\n    @staticmethod\n{}    def backward(ctx, grad): pass\n"
    right = source.format("A", "    @torch.autograd.function.once_differentiable\n")
    assert differentiable_twice({"x": right + source.format("B", "")}) == ["x.py: B"]


# -----------------------------------------------------------------------------
# pages


def listed_files(page):
    """Python files that stand first in a row of a table."""
    return re.findall(r"^\| `(\w+\.py)` \|", page, re.M)


def anchors_of(page):
    """Names of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.*)", without_code_blocks(page), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{repeated}" if repeated else name)
    return found


def without_code_blocks(page):
    return re.sub(r"^ *```.*?^ *```", "", page, flags=re.M | re.S)


def dead_links(pages, exists):
    """Links between pages, {path: text}, to files or headings that are not there. exists: of a path, is it?"""
    wrong = []
    for path, page in pages.items():
        prose = re.sub(r"`[^`]*`", "", without_code_blocks(page))
        for link in re.findall(r"\]\(([^)\s]*)[^)]*\)", prose):
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) if target else path
            if not exists(file):
                wrong.append(f"{path}: {link}: no such file")
            elif anchor and anchor not in anchors_of(pages.get(file, "")):
                wrong.append(f"{path}: {link}: no such heading")
    return wrong


def test_the_readme_lists_every_file():
    assert sorted(listed_files(PAGES["README.md"])) == [f"{module}.py" for module in SOURCES]


def test_listed_files_are_those_of_the_first_cell():
    assert listed_files("| `b.py` | as `c.py` |\n| a | `d.py` |\n| `e` | |\n| `a.py` | |\nsee `f.py`") == [
        "b.py",
        "a.py",
    ]


def test_links_lead_somewhere():
    assert dead_links(PAGES, lambda path: (REPO / path).exists()) == []


def test_dead_links_are_found():
    readme = "# A `b_c`, d!\n[x](docs/y.md#two-words) [x](#a-b_c-d) ![x](no.png)\n```\n# [x](in-code.md)\n```\n"
    page = "## Two words\n## Two words\n[x](#two-words-1) [x](../README.md) [x](#two-words-2) [x](https://z/#q)"
    pages = {"README.md": readme, "docs/y.md": page}
    found = dead_links(pages, pages.__contains__)
    assert found == ["README.md: no.png: no such file", "docs/y.md: #two-words-2: no such heading"]
