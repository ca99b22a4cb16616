"""How a run was started: what others may see of it, and how it is gone on with."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_prune.report.invocation import HIDDEN, Invocation, current, invoked, redacted, redacted_setting

SECRETS = (
    *("api_key", "apikey", "api-key", "API_KEY", "secret", "client_secret", "token", "hf_token", "password"),
    *("db_passwd", "credentials", "auth", "private_key", "access_key_id"),
)
HARMLESS = ("num_tokens", "tokens", "author", "keys", "key", "monkey", "authentic", "token_dim", "accuracy")


@pytest.mark.parametrize("name", SECRETS)
def test_what_is_named_as_a_secret_is_hidden_wherever_it_stands(name):
    value = "s3cr3t"
    assert value not in str(redacted({"logger": {"deep": [{name: value}]}}))
    for setting in (
        f"+logger.wandb.{name}={value}",
        f"logger={{{name}: {value}, project: x}}",
        f'a={{b:{{{name}:"{value}"}}}}',
    ):
        assert value not in redacted_setting(setting), setting
        assert value not in Invocation(("python", "train.py"), (setting,)).command
        assert value not in Invocation(("python", "train.py"), (setting,)).resumed("last.ckpt")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_sounds_like_one_is_shown(name):
    assert redacted({name: "shown"}) == {name: "shown"}
    assert redacted_setting(f"a.{name}=shown") == f"a.{name}=shown"


def test_an_interpolation_shows_no_value_and_an_unset_secret_is_none():
    config = {"api_key": "${oc.env:WANDB_API_KEY}", "token": None, "url": "https://me:pw@host/x?a=b"}
    assert redacted(config) == {**config, "url": f"https://{HIDDEN}@host/x?a=b"}


@pytest.mark.parametrize(
    "path", ["last.ckpt", "/a b/c.ckpt", "epoch=3-step=4.ckpt", "it's.ckpt", "a,b.ckpt", "{x}.ckpt", "ü.ckpt"]
)
def test_the_command_that_goes_on_gives_back_the_path(path):
    """Through a shell's and Hydra's own parser, whatever the path has in it."""
    started = Invocation(("python", "train.py"), ("pruning=erk", "ckpt_path=old.ckpt", "seed=3"))
    words = shlex.split(started.resumed(path))
    assert words[:4] == ["python", "train.py", "pruning=erk", "seed=3"]
    (override,) = OverridesParser.create().parse_overrides(words[4:])
    assert (override.key_or_group, override.value()) == ("ckpt_path", path)


APP = """
import hydra
from lightning_prune.report.invocation import current

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    found = current()
    print(found.command, found.resumed("last.ckpt"), found.config, sep="\\n")

import sys
main()
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("resumes", [True, False])
def test_any_hydra_application_is_known(subprocess_env, tmp_path, resumes):
    """One that knows nothing of reports: what Hydra has noted of it is enough, and its secrets stay its own."""
    (tmp_path / "app.py").write_text(APP)
    known = "ckpt_path: null\n" if resumes else ""
    (tmp_path / "app.yaml").write_text(
        f"lr: 1\nlogger: {{api_key: s3cr3t}}\nfolder: ${{hydra:runtime.cwd}}\n{known}"
    )
    command = [sys.executable, "app.py", "lr=3", "logger.api_key=0th3r"]
    done = subprocess.run(command, cwd=tmp_path, env=subprocess_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, *config = done.stdout.splitlines()
    assert first == "python app.py lr=3 'logger.api_key=***'"
    assert second == (f"{first} ckpt_path=last.ckpt" if resumes else "None")
    assert {"lr: 3", "  api_key: '***'", "folder: ${hydra:runtime.cwd}"} <= set(config)


def test_it_is_known_only_while_the_run_lasts():
    started = Invocation(("python", "train.py"))
    with invoked(started):
        assert current() is started
    assert current() is None
