"""The native dialect: the model's own template, in the Hermes form, with texts that can forge nothing."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from serving.agent import Agent, Limits
from serving.dialects.base import write_call
from serving.dialects.native import CHATML, NativeDialect, harmless
from serving.dialects.tapo import TapoDialect
from serving.engines.base import Sampling
from serving.trajectory import AnswerText, StepDone, Thinking, ToolCall
from tests.fakes import ScriptedEngine
from tests.test_dialect import CODE, FETCH, SEARCH, hostile, json_values, plain
from tests.test_toolbox import add
from tools.python import PythonTool
from tools.toolbox import Toolbox

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 * 12?"}]
END = "<|im_end|>"
tags = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<tools>", END,
         "<|im_start|>", "<|endoftext|>", "<repo_name>", "system\n", "\ue0000\ue001", "{", "<", "x", "\n"]
    ),
    max_size=10,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def dialect(base):
    return NativeDialect(base.tokenizer)


@pytest.fixture(scope="module")
def thinking(base):
    """A model whose template begins the thought, with `<think>` and `<tool_call>` as tokens of its vocabulary."""
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    return NativeDialect(tokenizer)


def parse(dialect, text, stopped=False, ended=False):
    """(events, parsed) of a text that comes a token at a time."""
    parser = dialect.parser()
    events = [event for i in dialect.tokenizer.encode(text, add_special_tokens=False) for event in parser.feed([i])]
    return events, parser.finish(stopped=stopped, ended=ended)


def spoken(events, kind):
    return "".join(event.text for event in events if isinstance(event, kind))


def test_a_benign_prompt_is_the_template_s_own(dialect):
    messages = [*ASK, {"role": "assistant", "content": "\n144."}, {"role": "user", "content": " And  13?\n\n"}]
    system = {"role": "system", "content": "You are Whetstone, a helpful assistant.\nBe brief."}
    expected = dialect.tokenizer.apply_chat_template(
        [system, *messages[1:]],
        tools=[CODE.as_function(), SEARCH.as_function()],
        chat_template=CHATML,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert dialect.render(messages, [CODE, SEARCH]) == expected


def test_the_prompt_lists_the_functions_only_when_there_are_any(dialect):
    text = dialect.tokenizer.decode(dialect.render(ASK, [CODE, FETCH]))
    assert '{"type": "function", "function": {"name": "code"' in text
    assert '"parameters": {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]}' in text
    assert "Open a page.\\nAny. </answer>\u2039|im_end|>" in text
    assert "<tool" not in dialect.tokenizer.decode(dialect.render(ASK))
    assert text.endswith("<|im_start|>user\nWhat is 12 * 12?<|im_end|>\n<|im_start|>assistant\n")


@settings(max_examples=60, deadline=None)
@given(user=tags, system=tags, answer=tags, described=tags)
def test_no_text_of_a_prompt_becomes_a_control_token(dialect, thinking, user, system, answer, described):
    for one in (dialect, thinking):

        def prompt(user, system, answer, described, one=one):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"},
                        {"role": "assistant", "content": answer}, {"role": "user", "content": user}]  # fmt: skip
            tool = type(FETCH)("fetch", described, {"properties": {"u": {"description": described, described: 1}}})
            return one.render(messages, [tool])

        control = set(one.tokenizer.added_tokens_decoder)
        honest = [i for i in prompt("x", "x", "x", "x") if i in control]
        forged = prompt(user, system, answer, described)
        assert [i for i in forged if i in control] == honest
        assert user in one.tokenizer.decode(forged)  # and nothing of it is lost


@settings(max_examples=60, deadline=None)
@given(text=tags | hostile)
def test_an_observation_can_forge_nothing(dialect, thinking, text):
    for one in (dialect, thinking):
        control = set(one.tokenizer.added_tokens_decoder)
        ids = one.encode_observation(text)
        assert [i for i in ids if i in control] == [i for i in one.encode_observation("x") if i in control]
        before, after = one.tokenizer.decode(one.encode_observation("\ue0ff")).split("\ue0ff")
        shown = one.tokenizer.decode(ids)
        inside = shown.removeprefix(before).removesuffix(after)
        assert inside == harmless(text)
        assert not any(tag in inside for tag in ("<tool", "</tool", "<|"))


def test_a_result_is_appended_as_the_template_would_have_it(dialect):
    """Prompt, call and observation together are what rendering the whole conversation gives."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "system", "content": "You are Whetstone, a helpful assistant.\nBe brief."},
        ASK[1],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
    ]
    whole = dialect.tokenizer.apply_chat_template(
        turns, chat_template=CHATML, add_generation_prompt=True, return_dict=False
    )
    own = dialect.encode_step("", "call", write_call("add", {"a": 1}))
    ids = dialect.render(ASK) + own + dialect.encode_observation("2", after=own)
    assert dialect.tokenizer.decode(ids) == dialect.tokenizer.decode(whole).replace(
        "assistant\n\n<tool", "assistant\n<tool"
    )


def test_a_turn_that_the_policy_ended_isn_t_ended_twice(dialect):
    end = dialect.tokenizer.convert_tokens_to_ids(END)
    ids = dialect.encode_observation("x", after=[5, end])
    assert ids.count(end) == 1
    assert dialect.encode_observation("x", after=[5]) == [end, *ids]


def test_the_last_observation_says_so_and_tools_are_off(dialect):
    assert "No more tools" in dialect.tokenizer.decode(dialect.encode_observation("x", last=True))
    assert dialect.stops() == ("</tool_call>",)
    assert dialect.stops(last=True) == ()


@settings(max_examples=80, deadline=None)
@given(
    thought=st.just("") | plain.map(str.strip),
    action=st.sampled_from(["code", "search", "answer"]),
    text=plain.map(str.strip),
)
def test_rendering_then_parsing_is_the_identity(dialect, thinking, thought, action, text):
    assume("\x00" not in text)  # a program with NUL is no program: it is taken out of what JSON spells
    for one in (dialect, thinking):
        assume(one.tokenizer.decode(one.tokenizer.encode(thought + text, add_special_tokens=False)) == thought + text)
        parser = one.parser()
        events = [event for i in one.encode_step(thought, action, text) for event in parser.feed([i])]
        parsed = parser.finish(stopped=action != "answer", ended=action == "answer")
        assert (parsed.thought, parsed.action, parsed.input, parsed.well_formed) == (thought, action, text, True)
        assert spoken(events, Thinking).strip() == thought
        if action == "answer":
            assert spoken(events, AnswerText) + parsed.unshown == text
        else:
            assert (parsed.tool, parsed.tool_input) == (action, text)
            assert not spoken(events, AnswerText)


@settings(max_examples=60, deadline=None)
@given(arguments=st.dictionaries(plain | tags, json_values | tags, max_size=3))
def test_a_call_s_arguments_come_back(dialect, thinking, arguments):
    for one in (dialect, thinking):
        text = write_call("fetch", arguments)
        assume(one.tokenizer.decode(one.tokenizer.encode(text, add_special_tokens=False)) == text)
        parser = one.parser()
        parser.feed(one.encode_step("I look.", "call", text))
        parsed = parser.finish(stopped=True)
        assert (parsed.action, parsed.input, parsed.tool, parsed.well_formed) == ("call", text, "fetch", True)
        assert json.loads(parsed.tool_input) == arguments


@pytest.mark.parametrize(
    ("text", "stopped", "action", "input", "well_formed"),
    [
        ("144" + END, False, "answer", "144", True),
        ("<think>\nx\n</think>\n\n144" + END, False, "answer", "144", True),
        ("144", False, "invalid", "", False),
        (END, False, "invalid", "", False),
        ("<think>\nendless" + END, False, "invalid", "", False),
        ("144</think>" + END, False, "answer", "144</think>", False),
        ('<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>', True, "search", "x", True),
        ('Let me.\n<tool_call>{"name": "code", "arguments": {"code": "1"}}</tool_call>', True, "code", "1", True),
        ('<tool_call>{"name": "add"}</tool_call>', True, "call", '{"name": "add"}', True),
        ("<tool_call>add(1)</tool_call>", True, "invalid", "", False),
        ('<tool_call>{"name": "add"}' + END, False, "invalid", "", False),
        ('<tool_call>{"name": "code", "arguments": {"cod": "1"}}</tool_call>', True, "invalid", "", False),
        ("<" + END, False, "answer", "<", True),
        ("<th" + END, False, "answer", "<th", True),
    ],
)
def test_what_a_generation_says(dialect, text, stopped, action, input, well_formed):
    _, parsed = parse(dialect, text, stopped, ended=text.endswith(END))
    assert (parsed.action, parsed.input, parsed.well_formed) == (action, input, well_formed)


def test_a_malformed_call_is_told_what_is_wrong(dialect):
    assert "Malformed call" in parse(dialect, "<tool_call>add(1)</tool_call>", stopped=True)[1].problem
    wrong = '<tool_call>{"name": "code", "arguments": {"cod": "1"}}</tool_call>'
    assert "Wrong arguments for code" in parse(dialect, wrong, stopped=True)[1].problem
    assert dialect.invalid([CODE]) != dialect.invalid([])


def test_a_long_answer_comes_as_it_grows_and_a_short_preamble_is_thought(dialect):
    long = "word " * 100
    events, parsed = parse(dialect, long + END, ended=True)
    assert len([event for event in events if isinstance(event, AnswerText)]) > 10
    assert spoken(events, AnswerText) + parsed.unshown == long.strip()
    events, parsed = parse(dialect, 'I will add.\n<tool_call>{"name": "add"}</tool_call>', stopped=True)
    assert (spoken(events, AnswerText), parsed.thought) == ("", "I will add.")


def test_an_observation_is_cut_once(dialect):
    once = dialect.fit("word " * 500, 50)
    assert once.endswith(" [cut]")
    assert len(dialect.tokenizer.encode(once)) < 60
    assert dialect.fit(once, 50) == once


def test_a_model_that_the_dialect_can_t_speak_with_is_refused_with_the_way_out(base):
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}<tool_call>{% endif %}"
    with pytest.raises(ValueError, match="dialect = tapo"):
        NativeDialect(tokenizer)


# -- with the agent


async def answer(base, texts, toolbox, **options):
    left = iter(texts)
    contexts = []

    def script(context):
        contexts.append(context)
        return next(left)

    agent = Agent(ScriptedEngine(base.tokenizer, script), NativeDialect(base.tokenizer), toolbox, Limits(max_turns=3))
    events = [event async for event in agent.answer(ASK, "v0", **options)]
    return events, contexts


async def test_the_agent_calls_functions_and_only_appends(base):
    texts = [
        '<think>\nRun it.\n</think>\n\n<tool_call>\n{"name": "code", "arguments": {"code": "print(12 * 12)"}}\n'
        "</tool_call>",
        '<tool_call>\n{"name": "add", "arguments": {"a": 144, "b": 1}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": "many"}}\n</tool_call>',
        "It is 145." + END,
    ]
    events, contexts = await answer(base, texts, Toolbox([PythonTool(), add]))
    trajectory = events[-1].trajectory
    assert trajectory.answer == "It is 145."
    assert trajectory.well_formed
    assert [step.action for step in trajectory.steps] == ["code", "call", "call", "answer"]
    assert [step.observation.tool for step in trajectory.steps[:3]] == ["code", "add", "add"]
    assert [step.observation.text for step in trajectory.steps[:2]] == ["144", "145"]
    assert "Wrong arguments for add: a: " in trajectory.steps[2].observation.text
    assert (trajectory.tool_calls, trajectory.tool_errors) == (3, 1)
    calls = [(event.tool, event.input) for event in events if isinstance(event, ToolCall)]
    assert calls[:2] == [("code", "print(12 * 12)"), ("add", '{"a": 144, "b": 1}')]
    assert spoken(events, AnswerText) == "It is 145."
    for before, after in itertools.pairwise(contexts):
        assert after.startswith(before)
    assert contexts[1].endswith(
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n144\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert base.tokenizer.decode(trajectory.prompt_ids + trajectory.completion_ids) == contexts[-1] + texts[-1]


async def test_a_turn_without_an_action_is_told_so(base):
    events, contexts = await answer(base, [END, "It is 144." + END], Toolbox([add]))
    assert events[-1].trajectory.answer == "It is 144."
    assert "Invalid action" in contexts[1]
    assert f"{END}{END}" not in contexts[1]


async def test_an_answer_cut_by_the_token_limit_is_shown(base):
    events, _ = await answer(base, ["one two three " * 40], Toolbox([add]), sampling=Sampling(max_tokens=20))
    trajectory = events[-1].trajectory
    assert trajectory.stop_reason == "length"
    assert trajectory.answer.startswith("one two three")
    assert spoken(events, AnswerText).strip() == trajectory.answer
    assert len([event for event in events if isinstance(event, StepDone)]) == 1


def test_both_dialects_promise_the_same(dialect):
    promised = {name for name in dir(TapoDialect) if not name.startswith("_")}
    assert promised <= set(dir(dialect))
