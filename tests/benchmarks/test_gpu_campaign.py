"""The GPU campaign's own machinery: limits, what is left behind, what is lacking, the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu_campaign import FOUND, MINUTES, PARTS, Campaign, Part, Result, lines_of
from benchmarks.limited import OVER_LIMIT
from tests.conftest import ROOT
from tests.processes import PATIENCE_S

DAEMON = """
import os, subprocess, sys, time
# As Ray starts its processes: in a session of its own, outliving the one that starts it.
subprocess.Popen(
    [sys.executable, "-c", "import subprocess, sys, time; p = subprocess.Popen(['sleep', '300'], "
     "start_new_session=True); print(p.pid, file=open(sys.argv[1], 'w'), flush=True)", {file!r}],
    start_new_session=True)
while not (os.path.exists({file!r}) and open({file!r}).read().strip()):
    time.sleep(0.01)
"""


def python(*lines: str) -> tuple[str, ...]:
    return (sys.executable, "-c", "\n".join(lines), FOUND)


def campaign(tmp_path: Path, *parts: Part, deadline_s: float = 60) -> Campaign:
    run = Campaign(tmp_path / "results", "cuda", deadline_s)
    run.run(parts)
    return run


def found(**values: object) -> str:
    everything = {"skipped": False, "reason": "", "rows": [], "figures": {}, **values}
    return f"import sys; open(sys.argv[1], 'w').write({json.dumps(everything)!r})"


def until(holds: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def ended(pid: int) -> bool:
    try:
        # A killed process is a zombie until its parent has asked for its end.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_part_over_its_limit_is_killed_with_its_daemons_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    file = tmp_path / "pid"
    began = time.monotonic()
    results = campaign(
        tmp_path,
        Part("long", 3, words=python(DAEMON.format(file=str(file)), "time.sleep(300)")),
        Part("next", 20, words=python(found(rows=[["answer", "42"]]))),
    ).results
    assert time.monotonic() - began < 25
    assert results["long"].status == "over its limit"
    assert results["long"].reason == "killed after 3 s"
    assert results["next"].status == "ok"
    assert results["next"].rows == [["answer", "42"]]
    assert ended(int(file.read_text()))


def test_a_part_that_ends_by_itself_leaves_no_daemon(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    results = campaign(
        tmp_path, Part("short", 30, words=python(DAEMON.format(file=str(file))))
    ).results
    assert results["short"].status == "ok"
    assert ended(int(file.read_text()))


def test_a_killed_campaign_leaves_no_process(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    words = python(DAEMON.format(file=str(file)), "time.sleep(300)")
    run = (
        "from pathlib import Path; from benchmarks.gpu_campaign import Campaign, Part; "
        f"Campaign(Path({str(tmp_path)!r}), 'cuda', 300).run([Part('long', 200, words={words!r})])"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # its folder stays behind
    started = subprocess.Popen([sys.executable, "-c", run], cwd=ROOT, env=env)
    assert until(lambda: file.is_file() and file.read_text().strip() != "")
    started.kill()
    started.wait()
    assert until(lambda: ended(int(file.read_text())))


def test_what_a_part_finds_is_written_while_it_runs(tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    words = python(
        found(rows=[["first figure", "1"]], figures={"first": 1}),
        "import os, time",
        f"while not os.path.exists({str(go_on)!r}): time.sleep(0.02)",
        found(rows=[["first figure", "1"], ["second figure", "2"]]),
    )
    run = Campaign(tmp_path / "results", "cuda", 60)
    thread = threading.Thread(target=run.run, args=[[Part("slow", 40, words=words)]])
    thread.start()
    table = tmp_path / "results" / "table.md"
    assert until(lambda: table.is_file() and "first figure" in table.read_text())
    cut_off = json.loads((tmp_path / "results" / "results.json").read_text())["parts"]["slow"]
    assert (cut_off["status"], cut_off["figures"]) == ("running", {"first": 1})
    go_on.touch()
    thread.join()
    assert "second figure" in table.read_text()
    assert "running" not in table.read_text()


def test_what_a_part_had_found_before_its_limit_is_kept(tmp_path: Path) -> None:
    words = python(found(rows=[["first figure", "1"]]), "import time; time.sleep(300)")
    results = campaign(tmp_path, Part("long", 2, words=words)).results
    assert results["long"].status == "over its limit"
    assert results["long"].rows == [["first figure", "1"]]


def test_what_is_lacking_is_a_line_and_no_failure(tmp_path: Path) -> None:
    table = campaign(
        tmp_path,
        Part("package", 5, needs=("json", "no_such_package")),
        Part("program", 5, programs=(("no-such-cc", "no-such-gcc"),)),
        Part("found out later", 5, words=python(found(skipped=True, reason="no such data"))),
    ).table()
    assert "| package |  | skipped: needs no_such_package, not installed for " in table
    assert "skipped: needs one of the programs no-such-cc, no-such-gcc: none is on PATH" in table
    assert "| found out later |  | skipped: no such data |" in table


def test_a_part_that_fails_says_why_and_its_output_is_in_the_log(tmp_path: Path) -> None:
    results = campaign(
        tmp_path,
        Part("raises", 20, words=python("raise ValueError('of this')")),
        Part("claims", 20, words=python(found(reason="not so: equal"), "raise SystemExit(1)")),
    ).results
    assert results["raises"].reason == "exit code 1: ValueError: of this"
    assert (results["claims"].status, results["claims"].reason) == ("failed", "not so: equal")
    log = (tmp_path / "results" / "campaign.log").read_text()
    assert "=== raises" in log
    assert "Traceback" in log


def test_caches_of_killed_parts_are_not_found_by_later_campaigns(tmp_path: Path) -> None:
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CIFAR_DIST_CACHE", "RAY_TMPDIR")
    caches = tmp_path / "caches"
    read = f"[os.environ[name] for name in {names}]"
    words = python(f"import os; open({str(caches)!r}, 'a').write(str({read}))")
    for _ in range(2):
        assert campaign(tmp_path, Part("part", 20, words=words)).results["part"].status == "ok"
    written = caches.read_text()
    first, second = written[1:-1].split("][")
    assert set(first.split(", ")).isdisjoint(second.split(", "))


def test_past_the_deadline_no_part_is_started(tmp_path: Path) -> None:
    results = campaign(
        tmp_path,
        Part("first", 60, words=python("import time; time.sleep(300)")),
        Part("second", 60, words=python("")),
        deadline_s=6,
    ).results
    assert results["first"].status == "over its limit"
    assert results["second"].status == "skipped"
    assert results["second"].reason == "no time left, it takes 60 s"


def test_no_part_may_take_the_whole_campaign_and_each_is_known() -> None:
    from benchmarks.gpu_parts import RUNS

    assert max(part.limit_s for part in PARTS) <= MINUTES * 60 / 4
    assert [part.name for part in PARTS if part.name not in RUNS] == []


def test_a_table_has_a_part_s_name_and_seconds_once() -> None:
    result = Result("ok", 10, 3.4, rows=[["a | b", "1"], ["c", "two\nlines"]])
    assert lines_of("part", result) == "| part | a \\| b | 1 | 3 |\n|  | c | two lines |  |"
    failed = Result("failed", 10, 3.4, "why", rows=[["c", "2"]])
    assert lines_of("part", failed) == "| part |  | failed: why | 3 |\n|  | c | 2 |  |"


def test_a_command_keeps_its_exit_code(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.limited"]

    def code(seconds: str, text: str) -> int:
        command = [*words, seconds, sys.executable, "-c", text]
        return subprocess.run(command, cwd=ROOT, check=False).returncode

    assert code("20", "raise SystemExit(7)") == 7
    assert code("20", "import os; os.kill(os.getpid(), 9)") == 128 + signal.SIGKILL
    assert code("1", "import time; time.sleep(300)") == OVER_LIMIT


def test_a_promise_that_does_not_hold_fails_the_part(tmp_path: Path) -> None:
    from benchmarks.gpu_parts.findings import Findings

    findings = Findings(tmp_path / "found.json")
    findings.claim("the same bits", True, "twice")
    findings.say("figure", "1", figure=1)
    assert json.loads(findings.file.read_text())["reason"] == ""
    findings.claim("the same bits", False)
    written = json.loads(findings.file.read_text())
    assert written["reason"] == "not so: the same bits"
    assert written["rows"] == [["figure", "1"], ["the same bits", "**no**"]]
    assert written["figures"] == {"figure": 1}


def test_without_a_gpu_a_part_is_skipped_with_the_reason(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks.gpu_campaign", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*words, "--part", "device"], cwd=tmp_path, env=env, capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| device |  | skipped: torch finds no GPU here |" in done.stdout


@pytest.mark.parametrize("given", ["", "/no/such/python"])
def test_without_python_3_12_the_rehearsal_says_what_to_install(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu_rehearsal import find_python

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no Python 3\.12 at .*install one") as raised:
        find_python(given)
    assert "\n" not in str(raised.value)
