"""What the source never does: unpickle, evaluate text, run a shell, or make objects of what a file names."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path
    for pattern in ("lightning_prune/**/*.py", "hydra_plugins/**/*.py", "*.py")
    for path in ROOT.glob(pattern)
)
BANNED = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "yaml.load", "yaml.unsafe_load", "tempfile.mktemp"),
    *("OmegaConf.register_new_resolver", "OmegaConf.to_object"),
}  # fmt: skip
BUILDS_OBJECTS = {"lightning_prune/cli/parts.py", "lightning_prune/cli/checks.py"}
"""Where Hydra makes objects of the configuration that the command line was given; of nothing else."""


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def found_in(paths, is_wrong):
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}"
        for path in paths
        for node, name in calls(path)
        if is_wrong(node, name)
    ]


def keyword(node, name):
    return next((ast.unparse(k.value) for k in node.keywords if k.arg == name), None)


def loads_a_checkpoint(node, name):
    """Calls that read a file of torch, or have the Trainer read one."""
    is_run = name.rpartition(".")[2] in ("fit", "validate", "test", "predict") and keyword(node, "ckpt_path")
    return name.endswith(("torch.load", ".load_from_checkpoint")) or bool(is_run)


def loads_unsafely(node, name):
    return loads_a_checkpoint(node, name) and keyword(node, "weights_only") != "True"


def runs_code(node, name):
    return name in BANNED or "True" in (keyword(node, "shell"), keyword(node, "allow_pickle"))


def test_there_is_something_to_look_at():
    assert len(SHIPPED) > 150
    assert len(found_in(SHIPPED, loads_a_checkpoint)) >= 4


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell():
    assert found_in(SHIPPED, runs_code) == []


def test_files_of_torch_are_read_as_weights_only():
    assert found_in(SHIPPED, loads_unsafely) == []


def test_only_the_command_line_makes_objects_of_a_configuration():
    others = [path for path in SHIPPED if str(path.relative_to(ROOT)) not in BUILDS_OBJECTS]
    assert (
        found_in(
            others, lambda node, name: name.rpartition(".")[2] in ("instantiate", "get_class", "get_method")
        )
        == []
    )


WRONG = (
    *("eval('1')", "torch.load(p)", "torch.load(p, weights_only=False)", "x.fit(m, ckpt_path=p)"),
    *("run(c, shell=True)", "np.load(f, allow_pickle=True)"),
)


@pytest.mark.parametrize("line", WRONG)
def test_the_rules_find_what_they_are_for(line, tmp_path):
    (path := tmp_path / "a.py").write_text(line)
    assert any(runs_code(node, name) or loads_unsafely(node, name) for node, name in calls(path))
