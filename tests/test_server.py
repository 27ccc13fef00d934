"""lm/server.py against a server that misbehaves: nothing lost, nothing asked twice, no secrets out.

    python -m pytest tests/test_server.py -n0
"""

import collections
import inspect
import socket
import threading
import time
from pathlib import Path

import diskcache
import fault_server
import pytest
from fault_server import HANG, FaultServer

from lm.budget import Budget, BudgetSpent, Pace, price_of, tokens_of
from lm.records import InputError, read_records, write_json
from lm.replies import Request
from lm.server import FAILURES_IN_A_ROW, FLAGS, Server, connect, generate_on
from lm.threads import in_threads
from scripts import (
    annotate,
    evaluate_alpaca,
    evaluate_mt_bench,
    evaluate_vicuna,
    generate,
    generate_dialogues,
)
from scripts.chat import make_folder, serving


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def client_of(server: FaultServer, tmp_path: Path | None = None, **options) -> Server:
    cache = str(tmp_path / "cache") if tmp_path else ""
    return Server("gpt-4", server.url, **{"cache": cache, "first_wait": 0.01, "attempts": 4,
                                          "timeout": 20, **options})


def questions(count: int) -> dict[int, Request]:
    return {index: Request([{"role": "user", "content": f"Q{index}."}]) for index in range(count)}


def echo(text: str) -> str:
    return f"answer to {text}"


@pytest.mark.parametrize("variable", [False, True])
def test_an_address_without_its_protocol_is_one_line(variable, monkeypatch):
    """The client would try it again and again."""
    if variable:
        monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000/v1")
    with pytest.raises(InputError, match="localhost:8000/v1: is no server's address; --base_url"):
        Server("gpt-4", "" if variable else "localhost:8000/v1")


PASSING = ["429", "500", "503", "408", "half", "drop", "empty", "html", "429 Retry-After: 0"]


def test_every_passing_fault_is_tried_again_and_nothing_is_asked_twice(tmp_path):
    plan = {f"Q{index}.": [fault] for index, fault in enumerate(PASSING)}
    with FaultServer(plan, echo) as server:
        client = client_of(server, tmp_path)
        replies = dict(client.ask(questions(12)))
        assert {index: reply.text for index, reply in replies.items()} == {
            index: f"answer to Q{index}." for index in range(12)}
        assert not any(reply.error or reply.cached for reply in replies.values())
        asked = collections.Counter(server.asked)
        assert all(asked[f"Q{index}."] == 1 + (index < len(PASSING)) for index in range(12))
        again = dict(client_of(server, tmp_path).ask(questions(13)))
        assert server.asked[-1] == "Q12." and len(server.asked) == 12 + len(PASSING) + 1
        assert [again[index].cached for index in range(13)] == [True] * 12 + [False]
        assert [again[index].text for index in range(12)] == [
            replies[index].text for index in range(12)]


def test_hanging_server_is_left_after_the_time_out(tmp_path):
    with FaultServer({"Q0.": ["hang"]}, echo) as server:
        start = time.monotonic()
        replies = dict(client_of(server, timeout=1).ask(questions(3)))
        assert time.monotonic() - start < HANG
    assert [replies[index].text for index in range(3)] == [f"answer to Q{i}." for i in range(3)]
    assert server.asked.count("Q0.") == 2


@pytest.mark.parametrize(("fault", "attempts", "message"), [
    ("429!", 4, "429"), ("500!", 4, "500"), ("half!", 4, "broken reply"),
    ("empty!", 4, "empty reply"), ("drop!", 4, "Connection error"), ("hang!", 2, "timed out"),
    ("400!", 1, "400"), ("403!", 1, "403"), ("429 Retry-After: 4000!", 1, "429"),
    ("refusal", 1, "refused: I will not judge this."), ("filter", 1, "content filter")])
def test_lasting_failure_is_recorded_and_asked_again_the_next_time(fault, attempts, message,
                                                                  tmp_path):
    with FaultServer({"Q1.": [fault]}, echo) as server:
        client = client_of(server, tmp_path, **({"timeout": 1, "attempts": 2} if "hang" in fault
                                              else {}))
        replies = dict(client.ask(questions(3)))
        assert message in replies[1].error and replies[1].text == ""
        assert replies[1].error and "\n" not in replies[1].error
        assert not replies[0].error and not replies[2].error
        assert server.asked.count("Q1.") == attempts
        server.plan.clear()
        again = dict(client_of(server, tmp_path).ask(questions(3)))
        assert again[1].text == "answer to Q1." and server.asked.count("Q1.") == attempts + 1
        assert len(server.asked) == attempts + 1 + 2


@pytest.mark.parametrize("header", ["Retry-After: 1", "Retry-After: {date}",
                                    "Retry-After-Ms: 1000"])
def test_all_wait_as_long_as_the_server_asks(header):
    with FaultServer({"Q0.": [f"429 {header}"]}, echo) as server:
        dict(client_of(server, concurrency=1).ask(questions(2)))
    first, *rest = server.times
    assert len(rest) == 2 and min(rest) - first > 0.95


@pytest.mark.parametrize(("fault", "message"), [
    ("401!", "the key is refused .* OPENAI_API_KEY"), ("404!", "no model gpt-4"),
    ("credit!", "out of credit")])
def test_hopeless_answers_stop_everything(fault, message):
    with FaultServer({"Q": [fault]}) as server:
        with pytest.raises(InputError, match=message) as error:
            dict(client_of(server, concurrency=2).ask(questions(50)))
        assert len(server.asked) <= 4
        assert "secret" not in str(error.value)


def test_a_server_that_fails_all_the_time_is_left_alone():
    with FaultServer({"Q": ["500!"]}) as server:
        replies = {}
        with pytest.raises(InputError, match=f"{FAILURES_IN_A_ROW} requests in a row failed"):
            for index, reply in client_of(server, attempts=1, concurrency=2).ask(questions(100)):
                replies[index] = reply
        assert FAILURES_IN_A_ROW <= len(replies) <= FAILURES_IN_A_ROW + 2
        assert len(server.asked) == len(replies)  # what was asked was also yielded


def test_no_server_is_said_soon():
    client = Server("m", "http://127.0.0.1:9/v1", first_wait=0.01, concurrency=2)
    with pytest.raises(InputError, match="no server answers there"):
        dict(client.ask(questions(30)))


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, capfd):
    with FaultServer({"Q0.": ["400!"], "Q1.": ["500!"]}, echo) as server:
        client = client_of(server, tmp_path)
        replies = dict(client.ask(questions(3)))
        print(client.estimate(questions(3)))
    assert server.keys == {"Bearer sk-secret-0123456789"}
    assert all("[key]" in replies[index].error for index in (0, 1))  # the server repeats it
    cache = diskcache.Cache(tmp_path / "cache", disk=diskcache.JSONDisk)
    written = str([(key, cache[key]) for key in cache])
    assert "answer to Q2." in written
    assert "secret" not in written + "".join(capfd.readouterr()) + str(replies)


@pytest.mark.parametrize("length", range(180, 300, 20))
def test_a_message_is_cut_outside_the_key(length, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-" + "0123456789" * (length // 10))
    with FaultServer({"Q0.": ["400!"]}) as server:
        reply = dict(client_of(server).ask(questions(1)))[0]
    assert "[key]" in reply.error and "0123" not in reply.error


@pytest.mark.parametrize("end", ["\r", "\n", " "])
def test_a_line_end_on_the_key_is_dropped(end, monkeypatch):
    """As Windows' .env files leave one; a header cannot hold it."""
    monkeypatch.setenv("OPENAI_API_KEY", f"sk-secret{end}")
    with FaultServer(answer=echo) as server:
        assert dict(client_of(server).ask(questions(1)))[0].text == "answer to Q0."
    assert server.keys == {"Bearer sk-secret"}


@pytest.mark.parametrize("key", ["sk-sécret", "sk-sec ret", "sk-sec\rret"])
def test_a_key_that_no_header_can_hold_is_one_line_without_it(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match=r"OPENAI_API_KEY has a space.* export") as error:
        Server("m", "http://127.0.0.1:9/v1")
    assert "sk-s" not in str(error.value)


def test_a_key_is_hidden_as_python_writes_it_too(monkeypatch):
    """Of a body that is no answer the error shows the start, with two backslashes for one."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-back\\slash-secret")
    monkeypatch.setattr(fault_server, "_completion", lambda *_: b"for sk-back\\slash-secret")
    with FaultServer() as server:
        reply = dict(client_of(server, attempts=1).ask(questions(1)))[0]
    assert reply.error == "broken reply 'for [key]'"
    body = b"." * 55 + b"sk-back\\slash-secret"  # no part of it stays where the start is cut
    monkeypatch.setattr(fault_server, "_completion", lambda *_: body)
    with FaultServer() as server:
        reply = dict(client_of(server, attempts=1).ask(questions(1)))[0]
    assert reply.error == f"broken reply '{'.' * 55}[key]'"


def test_the_hosted_service_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        Server("gpt-4")
    assert Server("m", "http://127.0.0.1:9/v1").base_url == "http://127.0.0.1:9/v1"


def test_equal_requests_are_sent_once_and_different_ones_are_not_mixed_up(tmp_path):
    with FaultServer(answer=echo) as server:
        client = client_of(server, tmp_path, price_in=1, price_out=1)
        same = {index: Request("Q.") for index in range(5)}
        replies = dict(client.ask({**same, 5: Request("Q.", seed=1), 6: Request("Q.", 7),
                                   7: Request("Q.", temperature=0.5),
                                   8: Request([{"role": "user", "content": "Q."}])}))
        assert len(server.asked) == 5 and {reply.text for reply in replies.values()} == {
            "answer to Q."}
        assert sum(reply.cost for reply in replies.values()) == pytest.approx(5 * 15e-6)
        other = Server("other", server.url, cache=str(tmp_path / "cache"))
        assert not dict(other.ask(same))[0].cached


def test_what_is_sent():
    with FaultServer() as server:
        client = client_of(server)
        dict(client.ask({0: Request("Q.", 7, 0.5, 0.9, seed=3),
                         1: Request([{"role": "user", "content": "R."}], temperature=-1)}))
    completion, chat = sorted(server.bodies, key=lambda body: "messages" in body)
    assert completion == {"model": "gpt-4", "prompt": "Q.", "max_tokens": 7, "temperature": 0.5,
                          "top_p": 0.9, "seed": 3}
    assert chat == {"model": "gpt-4", "messages": [{"role": "user", "content": "R."}],
                    "max_tokens": 512}


def test_forgotten_replies_are_asked_again(tmp_path):
    with FaultServer(answer=echo) as server:
        client = client_of(server, tmp_path)
        dict(client.ask(questions(2)))
        client.forget(questions(2)[1])
        dict(client.ask(questions(2)))
        assert sorted(server.asked) == ["Q0.", "Q1.", "Q1."]


def test_concurrency_and_pace():
    with FaultServer(delay=0.05) as server:
        dict(client_of(server, concurrency=3).ask(questions(12)))
        assert 1 < server.most_under_way <= 3
        server.times.clear()
        dict(client_of(server, requests_per_minute=600).ask(questions(6)))
    assert max(server.times) - min(server.times) > 0.4  # 0.1 s each


def test_budget_of_requests_stops_cleanly_and_the_rest_is_asked_later(tmp_path):
    with FaultServer({"Q0.": ["500"]}, echo) as server:
        client, replies = client_of(server, tmp_path, max_requests=6), {}
        with pytest.raises(BudgetSpent, match="budget of 6 requests is spent"):
            for index, reply in client.ask(questions(10)):
                replies[index] = reply
        assert len(server.asked) == 6 == client.budget.requests  # attempts count
        assert len(replies) in (4, 5) and not any(r.error for r in replies.values())
        rest = dict(client_of(server, tmp_path).ask(questions(10)))
        assert len(rest) == 10 and len(server.asked) == 6 + 10 - len(replies)


def test_budget_of_money_is_never_exceeded(tmp_path):
    """10 prompt and 5 new tokens cost $0.00025 here; the most that one can cost is set aside."""
    prices = {"price_in": 10, "price_out": 30, "max_cost": 0.02}
    with FaultServer(answer=echo, delay=0.02) as server:
        client, replies = client_of(server, **prices), {}
        with pytest.raises(BudgetSpent, match=r"higher --max_cost"):
            for index, reply in client.ask(questions(100)):
                replies[index] = reply
        most = client.price.of(tokens_of("user\nQ10."), 512)
        assert 0.02 - most < client.budget.cost <= 0.02
        assert client.budget.cost == pytest.approx(len(replies) * 0.00025)
        assert sum(r.cost for r in replies.values()) == pytest.approx(client.budget.cost)
        more = client_of(server, **prices)
        more.budget.go_on_from([{"index": 0}, client.budget.spent()])
        with pytest.raises(BudgetSpent):
            dict(more.ask(questions(100)))
    assert len(server.asked) == len(replies)


def test_a_reply_that_was_lost_counts_in_full_and_one_that_was_refused_does_not():
    with FaultServer({"Q0.": ["hang!"], "Q1.": ["500!"]}) as server:
        client = client_of(server, attempts=1, timeout=1, price_in=10, price_out=30)
        dict(client.ask(questions(2)))
    assert client.budget.cost == client.price.of(tokens_of("user\nQ0."), 512)


def test_a_request_that_was_not_sent_is_none():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client = Server("m", f"http://127.0.0.1:{closed.getsockname()[1]}/v1", first_wait=0.01,
                        max_requests=5)
        with pytest.raises(InputError, match="no server answers there"):
            dict(client.ask(questions(9)))
    assert client.budget.requests == 0


def test_requests_that_are_given_up_count_what_they_cost_at_most():
    budget = Budget()
    budget.reserve(0.5)
    assert budget.spent() == {"requests": 1, "cost": 0.0}
    assert budget.spent(under_way=True) == {"requests": 1, "cost": 0.5}


def test_budget_waits_for_what_others_have_set_aside():
    budget = Budget(max_cost=1.0)
    budget.reserve(0.9)
    threading.Timer(0.1, budget.settle, (0.9, 0.1)).start()
    budget.reserve(0.8)
    budget.settle(0.8, 0.8)
    with pytest.raises(BudgetSpent):
        budget.reserve(0.2)


def test_prices(monkeypatch):
    hosted = "https://api.openai.com/v1"
    assert price_of("gpt-4-0613", hosted).of(1_000_000, 1_000_000) == 90
    assert price_of("gpt-4o-2024-08-06", hosted) == price_of("gpt-4o", hosted)
    assert price_of("gpt-4o-mini", hosted) != price_of("gpt-4o", hosted)
    assert price_of("gpt-4-1106-preview", hosted) == price_of("gpt-4-turbo", hosted)
    assert not price_of("gpt-4-of-mine", hosted).known
    assert price_of("gpt-4", "http://localhost:8000/v1").of(1000, 1000) == 0
    assert price_of("gpt-4", "https://127.0.0.1/v1").of(1000, 1000) == 0
    for elsewhere in ("http://localhost.example.org/v1", "http://127.0.0.1.example.org:80/v1"):
        assert price_of("gpt-4", elsewhere).of(1_000_000, 0) == 30
    assert price_of("x", hosted, 2, 0).of(1_000_000, 5) == 2
    with pytest.raises(InputError, match="belong together"):
        price_of("x", hosted, 2)
    with pytest.raises(InputError, match="needs the price of mine"):
        Server("mine", "https://example.org/v1", max_cost=1)


def test_estimate_says_what_is_left(tmp_path):
    with FaultServer(answer=echo) as server:
        client = client_of(server, tmp_path, price_in=10, price_out=30)
        dict(client.ask(questions(2)))
        said = client.estimate(questions(5))
    assert "3 requests" in said and "2 more are answered in the cache" in said
    assert "1536 new ones" in said and "$0.05" in said


@pytest.mark.parametrize("script", [annotate, generate, generate_dialogues, evaluate_alpaca,
                                    evaluate_mt_bench, evaluate_vicuna])
def test_all_scripts_that_ask_servers_have_the_same_flags(script):
    flags = inspect.signature(script.main).parameters
    assert {*FLAGS} - {*flags} <= {"cache"}  # evaluations have their own
    values = {name: flag.default for name, flag in flags.items()}
    server = connect("m", "http://127.0.0.1:9/v1", values | {
        "cache": "", "requests_per_minute": 60.0, "attempts": 3, "max_requests": 7})
    assert (server._pace._gap, server._attempts, server.budget.max_requests) == (1, 3, 7)


@pytest.mark.parametrize(("script", "needed"), [
    (evaluate_alpaca, {"model_outputs": "later.json"}),
    (evaluate_mt_bench, {"answers": "later.json"}),
    (evaluate_vicuna, {"answers": "later.json", "baseline": "later.json"})])
def test_a_judge_is_checked_before_there_are_answers(script, needed, monkeypatch, capsys):
    """A dry run finds what would stop the judge after an hour of answers; it asks nothing."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        script.main(**needed, judge_model="gpt-4", dry_run=True)
    with FaultServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("127.0.0.1", "127.1"))
        with pytest.raises(InputError, match="--max_cost needs the price of new"):
            script.main(**needed, judge_model="new", max_cost=1.0, dry_run=True)
        script.main(**needed, judge_model="new", max_cost=1.0, price_in=1.0, price_out=1.0,
                    dry_run=True)
    assert not server.asked
    assert "judge: new at" in capsys.readouterr().out


def test_pace_pauses_everybody():
    pace, stop = Pace(), threading.Event()
    pace.pause(0.2)
    start = time.monotonic()
    pace.wait(stop)
    assert time.monotonic() - start >= 0.19


def test_threads_finish_what_they_began_and_raise_what_went_wrong():
    def call(item):
        if item == 3:
            raise ValueError("three")
        return item

    done = {}
    with pytest.raises(ValueError, match="three"):
        for key, result in in_threads(call, dict.fromkeys(range(3)) | {3: 3}, 1, threading.Event()):
            done[key] = result
    assert set(done) == {0, 1, 2}


def test_generation_streams_and_fails_at_the_end():
    with FaultServer({"Q1.": ["400!"]}, echo) as server:
        done = {}
        with pytest.raises(InputError, match="1 of 3 requests failed"):
            for index, response in generate_on(client_of(server), {i: f"Q{i}." for i in range(3)},
                                               max_new_tokens=9, temperature=1.0, top_p=0.9):
                done[index] = response
    assert {index: response.text for index, response in done.items()} == {
        0: "answer to Q0.", 2: "answer to Q2."}
    assert done[0].finish_reason == "stop"
    assert len({body["seed"] for body in server.bodies}) == 3
    assert {body["max_tokens"] for body in server.bodies} == {9}


def test_a_real_server(tiny_llama, tmp_path):
    """`transformers serve` and a random model: it answers as the model does in this process."""
    questions = [{"instruction": text, "output": "Red."} for text in ("Name a colour.", "Sing.")]
    write_json(tmp_path / "prompts.json", questions)
    common = {"data_path": str(tmp_path / "prompts.json"), "max_new_tokens": 8}
    make_folder(tmp_path / "m", tiny_llama, "alpaca")
    generate.main(str(tiny_llama), output_path=str(tmp_path / "here.json"), **common)
    with serving(tmp_path / "m", "float32") as url:
        for template in ("alpaca", "chat"):  # completions; a chat, with the same template
            generate.main("m", template, base_url=url, **common,
                          output_path=str(tmp_path / f"{template}.json"))
            assert outputs(tmp_path / f"{template}.json") == outputs(tmp_path / "here.json")
        client = Server("m", url, cache=str(tmp_path / "cache"))
        asked = {0: Request([{"role": "user", "content": "Name a colour."}], 5),
                 1: Request("The cat", 5)}
        for cached in (False, True):
            replies = dict(client.ask(asked))
            assert {(reply.new_tokens, reply.finish_reason, reply.error, reply.cached)
                    for reply in replies.values()} == {(5, "length", "", cached)}
            assert replies[0].prompt_tokens > replies[1].prompt_tokens > 0
        judged = tmp_path / "judged.json"
        with pytest.raises(SystemExit):  # what it says is cut off, so none is a judgment
            annotate.main(str(tmp_path / "prompts.json"), str(judged), model="m", base_url=url,
                          max_new_tokens=5, cache="")
    lines = read_records(annotate.journal_file(judged))
    assert [line["error"] for line in lines[1:]] == ["cut off before its end"] * 2


def outputs(path: Path) -> list[str]:
    return [record["output"] for record in read_records(path)]
