"""Every Python and C++ example of the README and of docs/ runs. (make lint checks the links.)"""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import ways

import torch_selfattn
from torch_selfattn import integrations

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(p for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")] if p.exists())
IDS = [str(p.relative_to(ROOT)) for p in DOCUMENTS]


def blocks(path, language):
    """(line, source) of each fenced block of a language."""
    text = path.read_text()
    found = []
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append((text.count("\n", 0, match.start()) + 2, match.group(1)))
    return found


EXAMPLES = [p for p in DOCUMENTS if blocks(p, "python")]


OPTIONAL = ("transformers",)  # examples may import these where they are installed


def missing_packages(path):
    sources = "\n".join(source for _, source in blocks(path, "python"))
    return [
        name
        for name in OPTIONAL
        if re.search(rf"^ *(import|from) {name}\b", sources, re.MULTILINE)
        and importlib.util.find_spec(name) is None
    ]


def run_python(path, folder, monkeypatch):
    """The blocks of a document in their order and in one namespace, as a reader would run them."""
    monkeypatch.chdir(folder)  # examples write files
    torch.manual_seed(0)
    # A file, because TorchScript reads sources; its line numbers are those of the document.
    file = folder / f"example_{path.stem}.py"
    lines = [""] * len(path.read_text().splitlines())
    for line, source in blocks(path, "python"):
        sources = source.splitlines()
        lines[line - 1 : line - 1 + len(sources)] = sources
    file.write_text("\n".join(lines) + "\n")
    if "torchrun --nproc-per-node=2" in path.read_text():
        run_in_processes(file)
        return
    exec(compile(file.read_text(), str(file), "exec"), {"__name__": "example"})


def run_in_processes(file):
    """A script for two processes. Now and then one of them dies when it is done, of a thread that
    gloo has not joined; then once more."""
    status, output = run_once_in_processes(file)
    if status != 0 and "terminate called without an active exception" in output:
        status, output = run_once_in_processes(file)
    assert status == 0, output


def run_once_in_processes(file):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    folders = [str(Path(torch_selfattn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    process = subprocess.Popen(
        [*launch, file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends the two as well
        output, _ = process.communicate()
    return process.returncode, output


def build_and_run(path, folder):
    """Builds the project made of a document's cmake and cpp blocks; runs it in the folder."""
    (folder / "CMakeLists.txt").write_text(blocks(path, "cmake")[0][1])
    (folder / "main.cpp").write_text(blocks(path, "cpp")[0][1])
    drop = ("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "CMAKE_PREFIX_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    if shutil.which("ccache"):
        environment |= {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CCACHE_NOHASHDIR": "1"}
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    prefix = f"-DCMAKE_PREFIX_PATH={torch_selfattn.cmake_prefix_path}"
    (program,) = re.findall(r"add_executable\((\w+)", blocks(path, "cmake")[0][1])
    commands = [
        [cmake, "-GNinja", "-S", folder, "-B", folder / "build", prefix],
        [cmake, "--build", folder / "build"],
        [folder / "build" / program],
    ]
    for command in commands:
        run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def is_slow(path):
    """Compiles a program, or starts processes."""
    return bool(blocks(path, "cpp")) or path.name == "distributed.md"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=str(p.relative_to(ROOT)), marks=[pytest.mark.slow] if is_slow(p) else [])
        for p in EXAMPLES
    ],
)
def test_examples_run(path, tmp_path, monkeypatch):
    if missing := missing_packages(path):
        pytest.skip(f"{', '.join(missing)} is not installed (dependency group `test`)")
    run_python(path, tmp_path, monkeypatch)
    if blocks(path, "cpp"):
        assert build_and_run(path, tmp_path).strip()


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_named_source_files_exist(path):
    """A path in code font is a path of this tree."""
    pattern = r"`((?:csrc|benchmarks|tests|tools|torch_selfattn|docs|examples|cmake)/[\w./]+\.\w+)`"
    for name in re.findall(pattern, path.read_text()):
        assert (ROOT / name).exists(), f"{path.name}: there is no {name}"


# ---- docs/explain.md: what explain() says, which depends on the machine --------------------------


def parse_explained(text):
    """call -> (heading, {implementation: what is said of it}), of paragraphs that begin with a line
    of calls that get the same answer."""
    calls = {}
    for paragraph in text.strip().split("\n\n"):
        names, heading, *lines = paragraph.splitlines()
        said = dict(line.strip().split(": ", 1) for line in lines)
        calls |= {name: (heading, said) for name in names.split("; ")}
    return calls


LACKS = "not supported, this CPU has no "


def on_this_machine(said, here):
    """A documented answer as it must be where `here` is the answer to some call: without the
    implementations that are not there, and refused by those that the processor cannot run. What is
    passed over stays so, unless one is forced."""
    lacking = {name: text for name, text in here.items() if text.startswith(LACKS)}
    result = {name: lacking.get(name, said[name]) for name in here}
    out = ("not supported", "supported, but passed over")
    able = [name for name in result if not result[name].startswith(out)]
    forced = [name for name, text in said.items() if text == "runs (forced)"]
    for name in able:
        if forced:
            result[name] = "runs (forced)" if name in forced else "supported, not the forced one"
        else:
            result[name] = "runs" if name == able[0] else "supported, but a better one runs"
    return result


def test_explain_is_as_documented():
    path = ROOT / "docs/explain.md"
    x = torch.zeros(1, 1, 1, 1)
    ((_, here),) = parse_explained("a call\n" + torch_selfattn.explain(x, x, x)).values()
    namespace = {}
    documented = blocks(path, "text")
    assert len(documented) == len(blocks(path, "python")) == 2
    for (_, source), (_, output) in zip(blocks(path, "python"), documented, strict=True):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(source, namespace)
        got, want = parse_explained(printed.getvalue()), parse_explained(output)
        assert got.keys() == want.keys()
        for call, (op, said) in want.items():
            assert got[call][0] == op
            assert list(got[call][1].items()) == list(on_this_machine(said, here).items()), call
    assert len(namespace["calls"]) == 10


def test_explain_as_documented_on_other_machines():
    """The rule by which the test above reads the page where the processor has less."""
    better, not_forced = "supported, but a better one runs", "supported, not the forced one"
    refused = "not supported, the inputs are not bfloat16"
    said = {"amx": refused, "avx512bf16": refused, "avx512": "runs", "avx2": better}
    said |= {"generic": better}
    assert on_this_machine(said, said) == said
    no_avx512 = said | {"amx": LACKS + "AMX", "avx512bf16": LACKS + "BF16"}
    no_avx512 |= {"avx512": LACKS + "AVX-512", "avx2": "runs"}
    assert on_this_machine(said, no_avx512) == no_avx512
    assert on_this_machine(said, {"generic": "runs"}) == {"generic": "runs"}
    pairs = said | {"amx": "runs", "avx512bf16": better, "avx512": better}
    assert on_this_machine(pairs, said) == pairs
    no_amx = said | {"amx": LACKS + "AMX"}
    assert on_this_machine(pairs, no_amx) == no_amx | {"avx512bf16": "runs", "avx512": better}
    assert on_this_machine(pairs, no_avx512) == no_avx512
    passed_over = {"amx": "supported, but passed over: there are few queries"}
    assert on_this_machine(said | passed_over, said | passed_over) == said | passed_over
    assert on_this_machine(said | passed_over, no_avx512) == no_avx512
    forced = {name: "runs (forced)" if name == "avx512" else not_forced for name in said}
    want = no_avx512 | {"avx2": not_forced, "generic": not_forced}
    assert on_this_machine(forced, no_avx512) == want


def test_table_of_ways_is_of_these_tests(request):
    """The README's table (tools/ways_table.py) has an entry exactly where a test is marked."""
    _, _, table = (ROOT / "README.md").read_text().partition("<!-- ways -->\n")
    head, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in table.partition("<!-- end ways -->")[0].splitlines()
    ]
    assert head[1:] == ways.WAYS and [row[0] for row in rows] == ways.OPERATORS
    shown = {(row[0], way) for row in rows for way, n in zip(head[1:], row[1:], strict=True) if n}
    collected = request.config.stash[ways.COLLECTED]
    marked = set().union(*collected.values())
    assert marked <= shown
    if set(ROOT.glob("tests/python/test_*.py")) == set(collected):
        assert shown <= marked


@pytest.mark.slow
def test_api_reference_has_every_public_name(tmp_path):
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    run = subprocess.run(
        [*sphinx, "-d", tmp_path / "cache", ROOT / "docs/api", tmp_path / "html"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    pages = "".join(page.read_text() for page in (tmp_path / "html").glob("*.html"))
    public = (torch_selfattn, torch_selfattn.functional, torch_selfattn.nn, integrations)
    for module in public:
        for name in module.__all__:
            object_ = getattr(module, name)
            home = getattr(object_, "__module__", None)
            full = {f"{place}.{name}" for place in (home, module.__name__)}
            assert any(f'id="{n}"' in pages or f'id="module-{n}"' in pages for n in full), name
