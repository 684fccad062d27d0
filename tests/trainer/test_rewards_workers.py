"""Workers that hang, crash, eat memory or lose their parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prism.rewards import ProblemView, Workers, grade, rewards_of, score_batch, score_response, verifier_workers

ROOT = str(Path(__file__).resolve().parents[2])


def response(answer):
    return f"<caption>c</caption><think>t</think><answer>{answer}</answer>"


def alive(pid):
    """Whether a process runs; one that waits to be collected does not, but is told apart."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return "zombie" if state == "Z" else True


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture(scope="module")
def workers():
    with Workers(2) as pool:
        yield pool


def test_results_come_in_order_and_workers_stay(workers):
    outcomes = workers.map("math:sqrt", [(n * n,) for n in range(50)], 5)
    assert [o.value for o in outcomes] == list(range(50))
    before = workers.process_ids
    assert 1 <= len(before) <= 2 and os.getpid() not in before
    assert len({o.value for o in workers.map("os:getpid", [()] * 20, 5)} - set(before)) == 0
    assert workers.process_ids == before
    assert workers.map("math:sqrt", [], 5) == []


def test_a_hang_is_killed_in_time_and_costs_its_job_alone(workers):
    workers.map("os:getpid", [()] * 2, 5)
    begun = time.monotonic()
    # in C, with the interpreter's lock held: no handler in the process could end it
    outcomes = workers.map("builtins:pow", [(2, 3), (3, 10**10), (2, 5)], 1.0)
    assert [o.value for o in outcomes] == [8, None, 32]
    assert [o.reason for o in outcomes] == ["", "timeout", ""]
    assert time.monotonic() - begun < 6
    assert workers.map("math:sqrt", [(4,)], 5)[0].value == 2


def test_a_crash_and_an_exception_cost_their_job_alone(workers):
    calls = [("0",), ("__import__('os').abort()",), ("1/0",), ("__import__('sys').exit(3)",), ("7",), ("lambda: 0",)]
    outcomes = workers.map("builtins:eval", calls, 10)
    assert [o.reason for o in outcomes] == ["", "crash", "error", "error", "", "error"]
    assert outcomes[4].value == 7
    assert "status -6" in outcomes[1].detail and "ZeroDivisionError" in outcomes[2].detail
    assert workers.map("math:sqrt", [(4,)], 5)[0].value == 2


def test_jobs_from_many_threads(workers):
    results = {}

    def ask(n):
        results[n] = [o.value for o in workers.map("math:sqrt", [((n + i) ** 2,) for i in range(5)], 5)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {n: [n + i for i in range(5)] for n in range(8)}


def test_an_idle_worker_that_was_killed_is_replaced(workers):
    workers.map("os:getpid", [()] * 2, 5)
    for pid in workers.process_ids:
        os.kill(pid, signal.SIGKILL)
    assert until(lambda: not workers.process_ids)
    assert [o.reason for o in workers.map("os:getpid", [()] * 4, 5)] == [""] * 4


def test_memory_is_limited():
    with Workers(1, memory_bytes=1 << 30) as small:
        outcomes = small.map("builtins:bytearray", [(2 << 30,), (3,)], 10)
        assert [o.reason for o in outcomes] == ["memory", ""]


def test_close_leaves_no_process_and_no_zombie():
    pool = Workers(2)
    pool.map("os:getpid", [()] * 2, 5)
    ids = pool.process_ids
    assert ids
    pool.close()
    assert not any(alive(pid) for pid in ids)
    with pytest.raises(RuntimeError, match="expected open workers"):
        pool.map("os:getpid", [()], 5)


def test_close_from_another_thread_ends_a_call():
    pool = Workers(1)
    pool.map("os:getpid", [()], 5)
    threading.Timer(0.3, pool.close).start()
    with pytest.raises(RuntimeError, match="closed while they worked"):
        pool.map("time:sleep", [(60,)], 60)
    assert not pool.process_ids


def test_a_worker_that_cannot_start_is_an_error():
    with (
        Workers(1, preload=["no_such_module_here"]) as pool,
        pytest.raises(RuntimeError, match=r"(?s)expected a worker to start.*no_such_module_here"),
    ):
        pool.map("os:getpid", [()], 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workers(0), "Workers: expected count >= 1, got 0"),
        (lambda: Workers(1).map("os:getpid", [()], 0), "Workers.map: expected timeout_s > 0, got 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


CHILD = """
import sys, time
from prism.rewards import Workers
pool = Workers(1)
pool.map("os:getpid", [()], 5)
print(*pool.process_ids, flush=True)
try:
    pool.map("time:sleep", [(60,)], {limit})
except KeyboardInterrupt:
    print("interrupted", flush=True)
    # the pool goes on with a fresh worker
    print(pool.map("math:sqrt", [(9,)], 5)[0].value, flush=True)
"""


def start_child(limit):
    environment = os.environ | {"PYTHONPATH": ROOT}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(limit=limit)], stdout=subprocess.PIPE, text=True, env=environment
    )
    return child, int(child.stdout.readline())


def test_interrupt_is_clean():
    child, worker = start_child(60)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=20)
    assert output.split() == ["interrupted", "3.0"] and child.returncode == 0
    assert not alive(worker)


def test_workers_end_with_a_parent_that_is_killed():
    # busy at that moment: its own timer ends it, soon after its time limit
    child, worker = start_child(0.5)
    time.sleep(0.2)
    child.kill()
    child.wait(20)
    child.stdout.close()
    assert alive(worker) is True
    assert until(lambda: not alive(worker) or alive(worker) == "zombie")


# each bomb takes its whole time limit
BOMBS = ["9^{9^{9^{9}}}", r"\frac{1}{10^{10^{10}}}", r"x^{99999999} + (x+1)^{99999}"]


@pytest.mark.parametrize("bomb", [BOMBS[0], *(pytest.param(bomb, marks=pytest.mark.full) for bomb in BOMBS[1:])])
def test_a_pathological_answer_costs_its_own_accuracy(bomb):
    answers = [r"\frac{\sqrt{36}}{2}", bomb, r"\sqrt{4}+1"]
    with verifier_workers(1) as pool:
        verdicts = score_batch([response(a) for a in answers], ["3"] * 3, timeout_s=2, workers=pool)
    assert [v.accuracy for v in verdicts] == [1.0, 0.0, 1.0]
    assert verdicts[1].score == 0.2 and verdicts[1].reason in {"timeout", "memory", "crash", "wrong"}


def test_a_hanging_verifier_is_counted(caplog):
    # every response is valid and undecided without algebra, and one never ends
    answers = [r"\sqrt{9}", r"\prod_{n=1}^{10^{9}} (1 + \frac{1}{n^{2}})", r"\sqrt{16}"]
    with verifier_workers(1) as pool:
        verdicts = score_batch([response(a) for a in answers], [r"\frac{\sqrt{36}}{2}"] * 3, timeout_s=5, workers=pool)
    assert [v.reason for v in verdicts] == ["right", "timeout", "wrong"]
    assert any("timeout" in record.getMessage() for record in caplog.records)


# as deep as an answer of 500 characters can be; the reader of bare brackets calls itself for each
DEEP = [opening * 240 + "1, 2" + closing * 240 for opening, closing in ("[]", "{}", "()")] + [
    r"\frac{1}{" * 45 + "x" + "}" * 45
]


@pytest.mark.parametrize("gold", DEEP)
def test_a_deeply_nested_right_answer_costs_nothing_but_its_own_sample(gold):
    answers = [gold, gold.replace("1", "3"), f"{gold} "]
    verdicts = score_batch([response(a) for a in answers], [gold] * 3)
    assert [v.accuracy for v in verdicts] == [1.0, 0.0, 1.0]
    assert score_response(response("3"), gold)["accuracy"] == 0.0


def broken(*_):
    raise RecursionError("maximum recursion depth exceeded")


def test_an_error_of_the_verifier_is_counted_and_costs_its_sample_alone(monkeypatch, caplog):
    readable = grade.equivalent
    monkeypatch.setattr(
        grade, "equivalent", lambda golds, *rest: (broken if "bad" in golds else readable)(golds, *rest)
    )
    problems = [ProblemView("1", "How many?", gold, (), "test") for gold in ("3", "bad", "4")]
    rewards = rewards_of([response("3")] * 3, [1] * 3, problems, {})
    assert [(v.accuracy, v.format, v.reason) for v in rewards.verdicts] == [
        (1.0, 1.0, "right"),
        (0.0, 1.0, "error"),
        (0.0, 1.0, "wrong"),
    ]
    assert rewards.metrics() == {"failed_verdicts": {"error": 1}}
    assert "RecursionError" in caplog.text


def test_an_error_in_the_pool_is_counted_and_costs_its_sample_alone(caplog):
    # undecided without algebra
    answers = [r"\sqrt{9}", r"\sqrt{9}", r"\sqrt{16}"]
    with Workers(1, preload=["prism.rewards.algebra"]) as pool:
        pool.map("builtins:exec", [("import prism.rewards.algebra as a; a.verify, a.kept = None, a.verify",)], 5)
        verdicts = score_batch([response(a) for a in answers], [r"\frac{\sqrt{36}}{2}"] * 3, workers=pool)
        assert [v.reason for v in verdicts] == ["error"] * 3
        pool.map("builtins:exec", [("import prism.rewards.algebra as a; a.verify = a.kept",)], 5)
        verdicts = score_batch([response(a) for a in answers], [r"\frac{\sqrt{36}}{2}"] * 3, workers=pool)
    assert [v.reason for v in verdicts] == ["right", "right", "wrong"]
    assert sum("error" in record.getMessage() for record in caplog.records) == 3


# each repeated word or sign may be read in several ways, and the time must not grow with the number of readings
REPEATED = """
the answer |answer is |not |or |could be |i mean |wait, |is |because |and five |five hundred and |no, it is |(A) |A. |
a.|B) |(1) |1. |1-|0_|x - |x'|' |, |1 |1,|= |x = |[|\\frac{|^|$|\\text{a} |May 5 |the |it is |U.|so |we get |: |half a |
- |!"""


def test_no_text_of_an_answer_takes_long_to_read():
    texts = [
        (f"{start}{unit * 500}")[:499]
        for unit in REPEATED.replace("\n", "").split("|")
        for start in ("B) ", "Yes, ", "")
    ]
    calls = [(["B", "yes", "12", "(1) 5 (2) 7", "The area is 12"], text, None) for text in texts]
    calls += [([text], "The area is 12", None) for text in texts]
    with Workers(1, preload=["prism.rewards.equivalence"]) as pool:
        results = pool.map("prism.rewards.equivalence:equivalent", calls, 8)
    assert [(call[:2], result.reason) for call, result in zip(calls, results) if result.reason] == []
