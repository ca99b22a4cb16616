from __future__ import annotations

import json

from lightning_prune.sweep.notes import note_sweep
from lightning_prune.sweep.progress import Progress
from tests.sweep.test_summary import write_job


def test_it_counts_what_has_ended_and_names_the_best(tmp_path):
    progress = Progress(tmp_path)
    assert progress.look() == (0, 0, "starting")
    note_sweep(tmp_path, ["python"], {str(n): [f"a={n}"] for n in range(4)}, 4)
    assert progress.look() == (0, 4, "0 of 4 jobs done")
    write_job(tmp_path, 0, ["a=0"], {"val/acc": 0.5})
    write_job(tmp_path, 1, ["a=1"], {"val/acc": 0.75})
    write_job(tmp_path, 2, ["a=2"], error="killed")
    assert progress.look() == (3, 4, "2 of 4 jobs done, 1 failed; best val/acc 0.7500 (job 1)")
    (tmp_path / "2" / "metrics.json").write_text(json.dumps({"val/acc": 0.875}))  # tried again
    assert progress.look() == (3, 4, "3 of 4 jobs done; best val/acc 0.8750 (job 2)")


def test_it_watches_until_it_is_stopped_and_says_the_last_word(tmp_path, capsys):
    note_sweep(tmp_path, ["python"], {"0": ["a=0"]}, 1)
    progress = Progress(tmp_path, is_shared=True)
    progress.start()
    write_job(tmp_path, 0, ["a=0"], {"val/acc": 0.5})
    progress.stop()
    assert "sweep: 1 of 1 jobs done; best val/acc 0.5000 (job 0)" in capsys.readouterr().out
