"""What the parent process of a comparison learns about its child processes."""

from benchmarks import processes


def test_what_is_printed_is_returned():
  lines, reason = processes.printed(["calendar", "2026", "11"], timeout=60)
  assert lines[0].split() == ["November", "2026"]
  assert reason is None


def test_the_last_error_is_the_reason():
  lines, reason = processes.printed(["calendar", "now"], timeout=60)
  assert not lines
  assert "'now'" in reason


def test_what_takes_too_long_is_stopped():
  _, reason = processes.printed(["timeit", "while True: pass"], timeout=0.5)
  assert reason == "took longer than 0.5 seconds"
