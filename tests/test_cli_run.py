"""`nomoat run`: the chat loop, its commands, Ctrl-C, one-shot answers from argument and pipe, and safe terminal output."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import scripted
from nomoat.cli.chat import Chat, ctrl_c_as_flag
from nomoat.cli.conversation import Conversation
from nomoat.cli.run import command
from nomoat.cli.terminal import TerminalText, plain
from nomoat.engine.generate import Sampling
from nomoat.errors import InputError, NotFoundError
from nomoat.text.fim import Fim
from scripted import ScriptedModel

Lines = list[str | BaseException]


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted.install(monkeypatch)


def chat_with(model: ScriptedModel, lines: Lines, *, max_tokens: int = 100, stats: bool = False) -> tuple[Chat, str]:
    """Run a chat that types `lines` (an exception in it is raised by the prompt), then Ctrl-D. Gives the screen too."""
    script = iter(lines)

    def read(prompt: str) -> str:
        out.write(prompt)
        line = next(script, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    out = io.StringIO()
    chat = Chat(Conversation(model, Sampling(max_tokens=max_tokens)), read=read, out=out, stats=stats)
    chat.loop()
    return chat, out.getvalue()


def test_a_conversation_remembers_what_was_said() -> None:
    model = ScriptedModel(answer=lambda prompt: "Ada." if "Ada" in prompt else "Who are you?")
    chat, screen = chat_with(model, ["Hello", "I am Ada", "Who am I?"])
    assert "Who are you?\n" in screen
    assert screen.count("Ada.\n") == 2
    assert model.prompts[-1] == (
        "user: Hello\nassistant: Who are you?\nuser: I am Ada\nassistant: Ada.\nuser: Who am I?\nassistant: "
    )
    assert [m["role"] for m in chat.conversation.messages] == ["user", "assistant"] * 3


def test_messages_of_several_lines() -> None:
    model = ScriptedModel(answer=lambda prompt: "ok")
    chat_with(model, ["one \\", "two", '"""', "/clear is text here", "  kept", '"""', "", "   "])
    assert model.prompts[0] == "user: one \ntwo\nassistant: "
    assert model.prompts[1].endswith("user: /clear is text here\n  kept\nassistant: ")
    assert len(model.prompts) == 2


def test_commands(tmp_path: Path) -> None:
    model = ScriptedModel(answer=lambda prompt: "fine")
    saved = tmp_path / "talk.jsonl"
    chat, screen = chat_with(
        model,
        [
            "/help",
            "/save x",
            "/system Be brief.",
            "How?",
            "/stats",
            f"/save {saved}",
            "/clear",
            "Again?",
            f"/save {saved}",
            "/nonsense",
            "/exit",
            "never",
        ],
    )
    assert "/clear" in screen
    assert "Ctrl-C" in screen
    assert "nothing to save yet" in screen
    assert model.prompts == ["system: Be brief.\nuser: How?\nassistant: ", "system: Be brief.\nuser: Again?\nassistant: "]
    assert "4 tokens" in screen
    assert "unknown command /nonsense" in screen
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [m["content"] for m in rows[0]["messages"]] == ["Be brief.", "How?", "fine"]
    assert len(rows) == 2
    assert chat.stats


def test_saved_conversations_are_training_data(tmp_path: Path) -> None:
    from nomoat.data.readers import read_examples

    saved = tmp_path / "talk.jsonl"
    chat_with(ScriptedModel(answer=lambda prompt: "fine"), ["How?", f"/save {saved}"])
    (row,) = read_examples(saved)
    assert [m["content"] for m in row.messages] == ["How?", "fine"]


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    def answer(prompt: str) -> Iterator[str]:
        if "again" in prompt:
            yield from "still here"
            return
        yield "so far"
        signal.raise_signal(signal.SIGINT)
        yield "!"
        yield "never shown"

    before = signal.getsignal(signal.SIGINT)  # a job in the background has it ignored
    chat, screen = chat_with(ScriptedModel(answer), ["/stats", "go", "again"])
    assert "so far!\n[stopped]\n" in screen
    assert "never shown" not in screen
    assert "[7 tokens," in screen
    assert "still here" in screen
    assert chat.conversation.messages[1] == {"role": "assistant", "content": "so far!"}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts() -> None:
    with ctrl_c_as_flag() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_at_the_prompt_says_how_to_leave() -> None:
    model = ScriptedModel(answer=lambda prompt: "hi")
    _, screen = chat_with(model, [KeyboardInterrupt(), "Hello"])
    assert "Ctrl-D or /exit leaves" in screen
    assert "hi\n" in screen


def test_an_answer_at_its_limit_says_so() -> None:
    _, screen = chat_with(ScriptedModel(answer=lambda prompt: "x" * 50), ["go"], max_tokens=7)
    assert "xxxxxxx\n[the limit of 7 tokens is reached" in screen


def test_a_conversation_that_outgrows_the_context_is_refused_and_can_go_on() -> None:
    model = ScriptedModel(answer=lambda prompt: "ok", context=60)
    chat, screen = chat_with(model, ["short", "x" * 60, "/clear", "short"])
    assert "the context of this model 60" in screen
    assert len(model.prompts) == 2
    assert len(chat.conversation.messages) == 2


def test_an_answer_never_exceeds_the_context() -> None:
    model = ScriptedModel(answer=lambda prompt: "y" * 500, context=64)
    conversation = Conversation(model, Sampling(max_tokens=400))
    prompt = len("user: hi\nassistant: ")
    assert len("".join(conversation.ask("hi"))) == 64 - prompt
    assert conversation.timing.finish_reason == "length"


# ---- one-shot


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `nomoat run MODEL ...` on a scripted model that echoes the last thing the user said."""
    import nomoat.adapters.open

    def echo(prompt: str) -> str:
        return prompt.rsplit("user: ", 1)[1].removesuffix("\nassistant: ")

    model = ScriptedModel(answer=echo)

    def open_model(name: str, **_: object) -> tuple[ScriptedModel, object]:
        return model, object() if "+" in name else None

    monkeypatch.setattr(nomoat.adapters.open, "open_model", open_model)
    monkeypatch.setattr("nomoat.cli.fetch.fetch_missing", lambda name: None)

    def invoke(*arguments: str, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(command, ["tiny", *arguments], input=stdin, catch_exceptions=True)

    return invoke


def test_one_prompt_from_the_arguments(run: Callable[..., Result]) -> None:
    result = run("Hello", "there")
    assert (result.exit_code, result.stdout) == (0, "Hello there\n")


def test_one_prompt_from_a_pipe(run: Callable[..., Result]) -> None:
    assert run(stdin="Grüße\n".encode()).stdout == "Grüße\n"


def test_a_pipe_that_is_not_text_or_empty(run: Callable[..., Result]) -> None:
    for stdin, code in ((b"\xff\xfe", "E_UTF8"), (b"", "E_EMPTY"), (b" \n", "E_EMPTY")):
        result = run(stdin=stdin)
        assert isinstance(result.exception, InputError)
        assert result.exception.code == code


def test_json_output_keeps_the_exact_text(run: Callable[..., Result]) -> None:
    result = run("--json", "--seed", "7", "--system", "Be brief.", "a\x1b[31mb")
    body = json.loads(result.stdout)
    assert body["text"] == "a\x1b[31mb"
    assert "\x1b" not in result.stdout
    assert (body["seed"], body["tokens"], body["finish_reason"]) == (7, 7, "stop")
    assert {"prompt_tokens", "first_token_seconds", "seconds", "tokens_per_second", "load_seconds"} <= body.keys()


def test_plain_output_holds_no_escape_sequences(run: Callable[..., Result]) -> None:
    assert run("a\x1b[31mb\x1b]0;title\x07c\r\x08d").stdout == "abcd\n"


def test_stats_go_to_stderr(run: Callable[..., Result]) -> None:
    result = run("--stats", "hello")
    assert result.stdout == "hello\n"
    assert "[5 tokens," in result.stderr


@pytest.mark.parametrize(
    ("model", "given", "temperature"), [("tiny", [], 0.7), ("tiny+a", [], 0.0), ("tiny+a", ["--temperature", "1"], 1.0)]
)
def test_temperature(
    model: str, given: list[str], temperature: float, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sampling] = []
    original = scripted.stream

    def stream(model: ScriptedModel, prompt: list[int], sampling: Sampling, **rest: Any) -> Iterator[str]:
        seen.append(sampling)
        return original(model, prompt, sampling, **rest)

    monkeypatch.setattr("nomoat.engine.generate.stream", stream)
    CliRunner().invoke(command, [model, *given, "--stop", "END", "hello"], catch_exceptions=False)
    assert [s.temperature for s in seen] == [temperature]
    assert seen[0].stop == ("END",)
    assert seen[0].top_p == 0.95


def test_a_missing_model_is_fetched_first_and_only_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nomoat.cli.fetch import fetch_missing

    fetched: list[str] = []
    monkeypatch.setattr("nomoat.hub.pull.pull", lambda name, **_: fetched.append(name))
    fetch_missing("smollm2:135m+tickets@0.5")
    assert fetched == ["smollm2:135m"]
    here = tmp_path / "model.gguf"
    here.write_bytes(b"")
    fetch_missing(str(here))
    for missing in ("no-such-model", str(tmp_path / "other.gguf")):
        with pytest.raises(NotFoundError):
            fetch_missing(missing)
    assert len(fetched) == 1


# ---- filling a gap

#: Its tokens read \x01 before the prefix, \x02 before the suffix, \x03 before the middle.
FIM = Fim(scripted.FIRST_BYTE + 1, scripted.FIRST_BYTE + 2, scripted.FIRST_BYTE + 3, frozenset({99}))


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]) -> Callable[..., tuple[Result, list[Sampling]]]:
    """`nomoat run MODEL --fim ...` on a scripted code model that repeats its prompt; gives the samplings it was asked for."""
    import nomoat.adapters.open

    def invoke(*arguments: str, stdin: bytes | None = None, fim: Fim | None = FIM) -> tuple[Result, list[Sampling]]:
        model = ScriptedModel(answer=lambda prompt: prompt.replace("\x01", "[").replace("\x02", "|").replace("\x03", "]"))
        model.tokenizer = scripted.ByteTokenizer(fim=fim)
        monkeypatch.setattr(nomoat.adapters.open, "open_model", lambda name, **_: (model, None))
        asked: list[Sampling] = []

        def stream(model: ScriptedModel, prompt: list[int], sampling: Sampling, **rest: Any) -> Iterator[str]:
            asked.append(sampling)
            return scripted.stream(model, prompt, sampling, **rest)

        monkeypatch.setattr("nomoat.engine.generate.stream", stream)
        return run(*arguments, stdin=stdin), asked

    return invoke


def test_a_marker_says_where_the_gap_is(tmp_path: Path, fill: Callable[..., tuple[Result, list[Sampling]]]) -> None:
    file = tmp_path / "half.py"
    file.write_bytes(b"def f(x):\r\n    <FILL>\r\n  ")
    result, (sampling,) = fill("--fim", str(file), "--json")
    assert json.loads(result.stdout)["text"] == "[def f(x):\r\n    |\r\n  ]"
    assert (sampling.temperature, sampling.continues, sampling.stop_tokens) == (0.0, True, frozenset({99}))
    body = json.loads(result.stdout)
    assert (body["finish_reason"], body["prompt_tokens"]) == ("stop", len("[def f(x):\r\n    |\r\n  ]"))


def test_a_gap_from_stdin_and_with_a_suffix(fill: Callable[..., tuple[Result, list[Sampling]]]) -> None:
    result, _ = fill("--fim", "-", stdin="ä<FILL>é".encode())
    assert (result.exit_code, result.stdout) == (0, "[ä|é]\n")
    result, (sampling,) = fill("--fim", "-", "--suffix", " end", "--temperature", "1", "--stats", stdin=b"say <FILL>")
    assert result.stdout == "[say <FILL>| end]\n"
    assert sampling.temperature == 1.0
    assert "tokens/s" in result.stderr


@pytest.mark.parametrize(
    ("stdin", "code", "words"),
    [
        (b"no gap", "E_MARKER", "0 markers <FILL>: expected one"),
        (b"<FILL><FILL>", "E_MARKER", "2 markers"),
        (b"\xff<FILL>", "E_UTF8", "byte 0"),
        (b"x" * ((16 << 20) + 1), "E_LIMIT", "16 MiB"),
    ],
)
def test_a_text_without_one_gap_is_refused(
    stdin: bytes, code: str, words: str, fill: Callable[..., tuple[Result, list[Sampling]]]
) -> None:
    result, asked = fill("--fim", "-", stdin=stdin)
    assert isinstance(result.exception, InputError)
    assert result.exception.code == code
    assert words in str(result.exception)
    assert not asked


def test_a_model_that_cannot_fill_says_why(fill: Callable[..., tuple[Result, list[Sampling]]]) -> None:
    result, asked = fill("--fim", "-", stdin=b"a<FILL>", fim=None)
    assert isinstance(result.exception, InputError)
    assert result.exception.code == "E_FIM"
    assert "no tokens for prefix, suffix and middle" in str(result.exception)
    assert not asked


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--suffix", "x", "hello"), "--suffix needs --fim"),
        (("--fim", "-", "hello"), "neither PROMPT nor --system"),
        (("--fim", "-", "--system", "x"), "neither PROMPT nor --system"),
        (("--fim", "/nonexistent"), "does not exist"),
        (("--fim", "/"), "is a directory"),
    ],
)
def test_options_that_do_not_go_together(given: tuple[str, ...], words: str, run: Callable[..., Result]) -> None:
    result = run(*given, stdin=b"a<FILL>b")
    assert result.exit_code == 2
    assert words in result.stderr


# ---- what may reach a terminal


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\x1b[1;31mred\x1b[0m", "ared"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "link"),
        ("\x9b2Jgone", "gone"),
        ("\x1b(Btext", "text"),
        ("a\rb\x08c\x7fd\x00e\x85f", "abcdef"),
        ("tab\tline\n", "tab\tline\n"),
        ("\x1b]0;never closed\nnext", "\nnext"),
        ("\x1b[" + "1;" * 500 + "m", None),
        ("gnol\u202e", "gnol"),
        ("👩\u200d💻 नमस्ते", "👩\u200d💻 नमस्ते"),
    ],
)
def test_escape_sequences_and_controls_are_removed(raw: str, shown: str | None) -> None:
    whole = plain(raw)
    pieces = TerminalText()
    assert "".join(pieces.push(c) for c in raw) == whole
    assert whole == shown if shown is not None else "\x1b" not in whole


@given(st.lists(st.text(st.sampled_from("ab[];\\m\x07\x1b\x9b\x9d\n\x00"), max_size=6), max_size=6))
def test_no_control_character_ever_gets_through(pieces: list[str]) -> None:
    terminal = TerminalText()
    shown = "".join(terminal.push(piece) for piece in pieces)
    assert all(c == "\n" or c.isprintable() for c in shown)
    assert shown.count("\n") == "".join(pieces).count("\n")


def test_a_draft_model_and_the_type_of_the_cache_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, object]] = []
    drafts: list[object] = []
    models = {name: ScriptedModel(lambda asked: [asked]) for name in ("tiny", "small")}

    def open_model(name: str, *, kv_type: str, **_: object) -> tuple[ScriptedModel, object]:
        opened.append((name, kv_type))
        return models[name.partition("+")[0]], object() if "+" in name else None

    def session(model: ScriptedModel, **rest: Any) -> scripted.Session:
        drafts.append(rest["draft"])
        return scripted.Session(model, **rest)

    monkeypatch.setattr("nomoat.engine.generate.Session", session)
    monkeypatch.setattr("nomoat.engine.generate.stream", scripted.stream)
    monkeypatch.setattr("nomoat.adapters.open.open_model", open_model)
    monkeypatch.setattr("nomoat.cli.fetch.fetch_missing", lambda name: None)
    result = CliRunner().invoke(command, ["tiny", "hi", "--draft", "small", "--kv-type", "int8"])
    assert result.exit_code == 0, result.output
    assert opened == [("tiny", "int8"), ("small", "int8")]
    assert drafts == [models["small"]]
    refused = CliRunner().invoke(command, ["tiny", "hi", "--draft", "small+a"])
    assert "runs without adapters" in str(refused.exception)
