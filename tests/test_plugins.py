"""Plugins from files, modules and installed packages; every way to get one wrong is one clear line."""

import json
import pickle
import subprocess
import sys
from textwrap import dedent

import pytest

from batchsd import __version__
from batchsd.plugins import build, describe, pack
from batchsd.types import Sink, Task, UsageError

GOOD = """
import batchsd

class Square:
    columns = ("mask",)
    def __call__(self, request, model, generator): ...

class Lines:
    def open(self, folder, name, schema): ...

@batchsd.hookimpl
def register_tasks():
    return {"square": Square()}

@batchsd.hookimpl
def register_sinks():
    return {"lines": Lines()}
"""


@pytest.fixture
def plugin(tmp_path):
    """Writes a one-file plugin beside the job and gives the name that the job would say."""

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(dedent(text))
        return f"./{name}"

    return write


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a package with an entry point of group `batchsd` on the path, as pip lays it out."""

    def install(name, text, distribution, release="1.2"):
        site = tmp_path / f"site-{distribution}"
        info = site / f"{distribution}-{release}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {release}\n")
        (info / "entry_points.txt").write_text(f"[batchsd]\n{name} = {distribution}_code\n")
        (site / f"{distribution}_code.py").write_text(dedent(text))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, f"{distribution}_code", raising=False)
        return site / f"{distribution}_code.py"

    return install


def refusal(names, base):
    """The message of the one-line UsageError that `build` must raise."""
    with pytest.raises(UsageError) as error:
        build(names, base)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_builtins_come_through_the_hooks(tmp_path):
    registry = build([], tmp_path)
    assert "text" in registry.tasks and "parquet" in registry.sinks
    assert {"ddim", "euler", "euler_a", "dpmpp_2m"} <= set(registry.schedulers)
    assert set(registry.owners.values()) == {"batchsd"}
    names = {("task", n) for n in registry.tasks} | {("sink", n) for n in registry.sinks}
    assert set(registry.owners) == names | {("scheduler", n) for n in registry.schedulers}


def test_one_file_plugin(plugin, tmp_path):
    name = plugin(GOOD)
    registry = build([name], tmp_path)
    assert isinstance(registry.tasks["square"], Task) and registry.tasks["square"].columns == ("mask",)
    assert isinstance(registry.sinks["lines"], Sink)
    assert registry.owners["task", "square"] == name == registry.owners["sink", "lines"]
    with pytest.raises(TypeError):
        registry.tasks["other"] = None
    assert "text" in registry.tasks


def test_module_plugin(tmp_path, monkeypatch):
    (tmp_path / "module_plugin_a.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    registry = build(["module_plugin_a"], tmp_path / "elsewhere")
    assert registry.owners["task", "square"] == "module_plugin_a"
    assert registry.sources[-1].origin == "module" and len(registry.sources[-1].sha256) == 64


def test_installed_plugin_is_loaded_only_by_name(installed, tmp_path):
    installed("acme", GOOD, "acme_pictures")
    assert "square" not in build([], tmp_path).tasks
    assert "acme_pictures_code" not in sys.modules
    registry = build(["acme"], tmp_path)
    assert registry.owners["task", "square"] == "acme"
    assert registry.sources[-1].version == "1.2"


def test_watchers_hear(plugin, tmp_path):
    from batchsd.types import Progress, Shard

    name = plugin(
        """
        import batchsd
        heard = []
        @batchsd.hookimpl
        def shard_started(shard): heard.append(("started", shard.index))
        @batchsd.hookimpl
        def batch_done(progress): heard.append(("batch", progress.ok))
        @batchsd.hookimpl
        def shard_done(result): heard.append(("done", result))
        """
    )
    registry = build([name], tmp_path)
    shard = Shard(plan=1, index=3, total=5, file=0, start=0, count=10)
    registry.hook.shard_started(shard=shard)
    registry.hook.batch_done(progress=Progress(shard, 4, 0))
    registry.hook.shard_done(shard=shard, result="r")
    heard = registry.manager.get_plugin(name).heard
    assert heard == [("started", 3), ("batch", 4), ("done", "r")]


def test_packed_file_builds_where_the_file_is_not(plugin, tmp_path):
    packed = pack([plugin(GOOD)], tmp_path)
    (tmp_path / "mine.py").unlink()
    carried = tmp_path / "packed.pickle"
    carried.write_bytes(pickle.dumps(packed))
    code = dedent(
        f"""
        import pickle, json
        from pathlib import Path
        from batchsd.plugins import build
        registry = build(pickle.loads(Path({str(carried)!r}).read_bytes()), Path("/nowhere"))
        task = registry.tasks["square"]
        copy = pickle.loads(pickle.dumps(task))
        print(json.dumps([registry.owners["task", "square"], type(copy).__name__]))
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["./mine.py", "Square"]


def test_packing_imports_nothing(plugin, installed, tmp_path):
    installed("acme", "raise RuntimeError('imported')", "acme_boom")
    packed = pack([plugin("raise RuntimeError('imported')"), "acme"], tmp_path)
    assert [source.name for source in packed] == ["./mine.py", "acme"]


def test_other_code_on_another_node_is_refused(installed, tmp_path):
    code = installed("acme", GOOD, "acme_nodes")
    packed = pack(["acme"], tmp_path)
    assert build(packed, tmp_path).owners["task", "square"] == "acme"
    code.write_text(GOOD + "# newer\n")
    words = refusal(packed, tmp_path)
    assert "'acme'" in words and "differs between nodes" in words


def test_packed_hash_follows_the_text(plugin, tmp_path):
    (first,) = pack([plugin(GOOD)], tmp_path)
    (again,) = pack(["mine.py"], tmp_path)
    (other,) = pack([plugin(GOOD + "\n# changed\n")], tmp_path)
    assert first.sha256 == again.sha256 != other.sha256


SAMPLER = """
import batchsd

def mine(denoise, x, levels, noise):
    for here, there in levels:
        x = x + (there.sigma - here.sigma) * denoise.eps(x, here)
    return x

@batchsd.hookimpl
def register_schedulers():
    return {"mine": batchsd.Scheduler("mine", mine)}
"""


def test_a_sampler_from_a_file_is_euler(plugin, tmp_path):
    from batchsd.diffusion.schedule import NoiseSchedule

    schedulers = build([plugin(SAMPLER)], tmp_path).schedulers
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear"})
    mine, euler = (schedulers[name].program(schedule, 7) for name in ("mine", "euler"))
    assert (mine.packed == euler.packed).all()


def test_an_edited_file_is_loaded_anew(plugin, tmp_path):
    build([plugin(GOOD)], tmp_path)
    assert "round" in build([plugin(GOOD.replace('"square"', '"round"'))], tmp_path).tasks


def test_duplicate_names_both_owners(plugin, tmp_path):
    names = [plugin(GOOD, "one.py"), plugin(GOOD + "#\n", "two.py")]
    words = refusal(names, tmp_path)
    assert "task 'square'" in words and "'./one.py'" in words and "'./two.py'" in words


def test_builtin_names_are_taken(plugin, tmp_path):
    words = refusal([plugin(GOOD.replace('"lines"', '"parquet"'))], tmp_path)
    assert "sink 'parquet'" in words and "'batchsd'" in words and "'./mine.py'" in words


BROKEN = {
    "misspelt hook": (
        "import batchsd\n@batchsd.hookimpl\ndef register_task(): return {}",
        "unknown hook 'register_task'; did you mean 'register_tasks'?",
    ),
    "forgotten mark": ("def register_tasks(): return {}", "has no hook; put @batchsd.hookimpl before"),
    "import error": ("import no_such_thing", "No module named 'no_such_thing' ("),
    "error with its line": ("x = 1\nraise ValueError('no colour')", "ValueError: no colour (", "mine.py:2)"),
    "syntax": ("def register(:", "SyntaxError: ", "mine.py:1)"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "signature": (
        "import batchsd\n@batchsd.hookimpl\ndef register_tasks(job): return {}",
        "register_tasks(job)",
        "Argument(s) {'job'}",
    ),
    "no mapping": (
        "import batchsd\n@batchsd.hookimpl\ndef register_sinks(): return ['a']",
        "register_sinks returned list, not a mapping of name to sink",
    ),
    "nothing returned": (
        "import batchsd\n@batchsd.hookimpl\ndef register_sinks(): pass",
        "register_sinks returned NoneType, not a mapping",
    ),
    "hook that raises": (
        "import batchsd\n@batchsd.hookimpl\ndef register_tasks(): return {}['a']",
        "register_tasks failed: KeyError: 'a' (",
        "mine.py:3)",
    ),
    "half a task": (
        "import batchsd\n@batchsd.hookimpl\ndef register_tasks(): return {'a': len}",
        "register_tasks: 'a' (builtin_function_or_method) is not a task: it needs `columns` and `__call__`",
    ),
    "columns a string": (
        GOOD.replace('("mask",)', '"mask"'),
        "register_tasks: 'square' (Square) must give `columns` as a tuple",
    ),
    "class for an instance": (GOOD.replace("Lines()", "Lines"), "is the class Lines; register an instance"),
    "half a sink": (
        "import batchsd\n@batchsd.hookimpl\ndef register_sinks(): return {'a': 5}",
        "register_sinks: 'a' (int) is not a sink: it needs `open(folder, name, schema)`",
    ),
    "a sink's open": (
        GOOD.replace("def open(self, folder, name, schema)", "def open(self, folder)"),
        "register_sinks: 'lines' (Lines): open is called with (folder, name, schema): too many positional arguments",
    ),
    "a task's call": (
        GOOD.replace("def __call__(self, request, model, generator)", "def __call__(self, request, model, rng, more)"),
        "register_tasks: 'square' (Square): __call__ is called with (request, model, generator): missing a required",
    ),
    "a score's load": (
        "import batchsd\n@batchsd.hookimpl\ndef register_scores(): return {'a': batchsd.Score(lambda device: None)}",
        "register_scores: 'a' (Score): load is called with (settings, device): too many positional arguments",
    ),
    "a bare function for a filter": (
        "import batchsd\n@batchsd.hookimpl\ndef register_filters(): return {'a': len}",
        "register_filters: 'a' is builtin_function_or_method, not a batchsd.Filter; a function is wrapped",
    ),
    "no scheduler": (
        "import batchsd\n@batchsd.hookimpl\ndef register_schedulers(): return {'a': len}",
        "register_schedulers: 'a' is builtin_function_or_method, not a batchsd.Scheduler",
    ),
    "not linear": (
        SAMPLER.replace("return x", "return x.clamp(-1, 1)"),
        "register_schedulers: 'mine' cannot be used: scheduler 'mine' cannot run as a table: mine uses",
    ),
    "sampler that raises": (
        SAMPLER.replace("return x", "return x + nothing"),
        "'mine' cannot be used: NameError: name 'nothing' is not defined (",
        "mine.py:7)",
    ),
    "two names": (
        SAMPLER.replace('{"mine"', '{"other"'),
        "'other' is a scheduler that calls itself 'mine'; use one name",
    ),
    "taken alias": (
        SAMPLER.replace("mine)}", 'mine, aliases=("EULER",))}'),
        "schedulers 'euler' of plugin 'batchsd' and 'mine' of plugin './mine.py' both claim the name 'EULER'",
    ),
    "a name that is none": (
        "import batchsd\n@batchsd.hookimpl\ndef register_sinks(): return {7: 5}",
        "register_sinks: the name 7 is not a word",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_is_one_clear_line(case, plugin, tmp_path):
    text, *words = BROKEN[case]
    said = refusal([plugin(text)], tmp_path)
    assert "plugin './mine.py'" in said
    assert [word for word in words if word not in said] == [], said


def test_a_failed_import_is_tried_again(plugin, tmp_path):
    name = plugin("import no_such_thing")
    assert refusal([name], tmp_path) == refusal([name], tmp_path)


@pytest.mark.parametrize(
    "name, words",
    [
        ("./none.py", "cannot read"),
        ("beside", "a file beside the job is written './beside.py'"),
        ("acmee", "did you mean 'acme'?"),
        ("no_such_plugin", "no installed plugin and no module; installed plugins: acme"),
        ("", "no installed plugin and no module"),
        ("no.such.module", "no installed plugin and no module"),
    ],
)
def test_unknown_plugin(name, words, plugin, installed, tmp_path):
    installed("acme", GOOD, "acme_hints")
    plugin(GOOD, "beside.py")
    said = refusal([name], tmp_path)
    assert repr(name) in said and words in said


def test_two_packages_with_one_entry_point(installed, tmp_path):
    installed("acme", GOOD, "acme_first")
    installed("acme", GOOD, "acme_second")
    assert "entry point of both 'acme_first' and 'acme_second'" in refusal(["acme"], tmp_path)


def test_listed_twice(plugin, tmp_path):
    name = plugin(GOOD)
    assert refusal([name, name], tmp_path) == "plugins: './mine.py' is listed twice"


def test_two_of_one_short_name(plugin, tmp_path):
    """`[plugin.mine]` would be both's, and so would the line of the plan that holds the hash."""
    (tmp_path / "other").mkdir()
    names = [plugin(GOOD), plugin(SAMPLER, "other/mine.py")]
    assert refusal(names, tmp_path) == "plugins: './mine.py' and './other/mine.py' are both called 'mine'; rename one"


def test_describe(plugin, installed, tmp_path):
    installed("acme", "raise RuntimeError('imported')", "acme_listed", "3.1")
    name = plugin(GOOD + "@batchsd.hookimpl\ndef shard_started(shard): ...\n")
    rows = {(row["kind"], row["name"]): row for row in describe([name], tmp_path)}
    assert all(set(r) == {"name", "kind", "thing", "owner", "origin", "version"} for r in rows.values())
    assert rows["task", "text"] == {
        "name": "text",
        "kind": "task",
        "thing": "batchsd.tasks.text.TextTask",
        "owner": "batchsd",
        "origin": "built-in",
        "version": __version__,
    }
    assert rows["sink", "lines"]["owner"] == name
    assert rows["sink", "lines"]["origin"] == f"file {tmp_path / 'mine.py'}"
    assert rows["watcher", "shard_started"]["owner"] == name
    assert rows["not loaded", "acme"] | {"thing": ""} == {
        "name": "acme",
        "kind": "not loaded",
        "thing": "",
        "owner": "acme",
        "origin": "entry point acme_listed_code",
        "version": "3.1",
    }
    json.dumps(list(rows.values()))


def test_a_registry_needs_no_torch() -> None:
    """A plan, and "nothing to do", must not wait for torch: it takes seconds to import."""
    code = "import sys, pathlib, batchsd.plugins as p; p.build([], pathlib.Path()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
