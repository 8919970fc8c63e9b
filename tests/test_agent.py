"""The agent loop over a scripted engine and the real tools."""

from contextlib import aclosing

import pytest
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool

from serving.agent import Agent, Limits
from serving.dialects.tapo import TapoDialect
from serving.engines.base import PromptTooLong, Sampling
from serving.trajectory import AnswerText, Done, Observation, StepDone, Thinking, ToolCall, ToolResult
from tests.fakes import ScriptedEngine
from tools.context import ToolContext, context_of
from tools.python import PythonTool
from tools.search import SearchOptions, open_search
from tools.toolbox import Toolbox

ASK = [{"role": "user", "content": "What is 12 * 12?"}]
CODE = "<think>Compute.</think>\n<code>print(12 * 12)</code>"
ANSWER = "<think>Done.</think>\n<answer>144</answer>"


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    return Toolbox([PythonTool(), open_search(tmp_path_factory.mktemp("home"), SearchOptions())])


@pytest.fixture
def make(base, tools):
    def make_agent(script, limits=None, context=2048):
        return Agent(ScriptedEngine(base.tokenizer, script, context), TapoDialect(base.tokenizer), tools, limits)

    return make_agent


def in_turn(*texts):
    """A script that writes the next of `texts` at each generation."""
    left = iter(texts)
    return lambda context: next(left)


async def run(agent, messages=ASK, **options):
    async with aclosing(agent.answer(messages, "v0", **options)) as events:
        return [event async for event in events]


async def test_an_agent_may_read_less_than_its_engine_does(make):
    agent = make(in_turn(ANSWER), Limits(context=400), context=2048)
    length = len(agent.render(ASK))
    await run(agent, sampling=Sampling(max_tokens=1000))
    assert agent.engine.requests[0].sampling.max_tokens == 400 - length
    with pytest.raises(PromptTooLong, match="at most 336"):
        agent.render([{"role": "user", "content": "word " * 400}])
    assert make(in_turn(), Limits(context=4096), context=2048).context == 2048


async def test_a_tool_runs_and_the_answer_is_read_from_it(make):
    events = await run(make(in_turn(CODE, ANSWER)))
    kinds = [type(e) for e in events if not isinstance(e, Thinking | AnswerText)]
    assert kinds == [ToolCall, ToolResult, StepDone, StepDone, Done]
    trajectory = events[-1].trajectory
    assert trajectory.answer == "144"
    assert trajectory.steps[0].observation.text.strip() == "144"
    assert trajectory.tool_calls == 1
    assert trajectory.well_formed
    assert "".join(e.text for e in events if isinstance(e, AnswerText)) == "144"


async def test_tokens_are_the_engines_and_tool_tokens_are_masked(make, base):
    trajectory = (await run(make(in_turn(CODE, ANSWER))))[-1].trajectory
    own = [i for i, m in zip(trajectory.completion_ids, trajectory.mask, strict=True) if m]
    assert own == [i for t in (CODE, ANSWER) for i in base.tokenizer.encode(t, add_special_tokens=False)]
    assert all(p == 0.0 for p, m in zip(trajectory.logprobs, trajectory.mask, strict=True) if not m)
    assert len(trajectory.completion_ids) == len(trajectory.logprobs) == len(trajectory.mask)


async def test_after_the_last_turn_tools_are_off(make):
    contexts = []

    def script(context):
        contexts.append(context)
        return CODE if len(contexts) <= 2 else ANSWER

    trajectory = (await run(make(script, Limits(max_turns=2))))[-1].trajectory
    assert len(contexts) == 3
    assert "No more tools" in contexts[2]
    assert "No more tools" not in contexts[1]
    assert trajectory.answer == "144"


async def test_a_policy_that_never_answers_ends(make):
    trajectory = (await run(make(lambda context: CODE, Limits(max_turns=3))))[-1].trajectory
    assert trajectory.stop_reason == "no_answer"
    assert not trajectory.well_formed
    assert trajectory.tool_calls == 3


async def test_an_invalid_action_is_told_so_and_may_be_mended(make):
    events = await run(make(in_turn("I just chat.", ANSWER)))
    trajectory = events[-1].trajectory
    assert trajectory.steps[0].action == "invalid"
    assert "Invalid action" in trajectory.steps[0].observation.text
    assert trajectory.answer == "144"
    assert not trajectory.well_formed


async def test_own_tokens_of_an_answer_are_bounded(make):
    trajectory = (await run(make(lambda context: CODE, Limits(max_turns=50, answer_tokens=40))))[-1].trajectory
    assert trajectory.own_tokens <= 40
    assert trajectory.stop_reason in ("length", "no_answer")


async def test_a_hanging_tool_is_an_observation(make):
    slow = "<think>x</think>\n<code>import time; time.sleep(60)</code>"
    events = await run(make(in_turn(slow, ANSWER), Limits(tool_seconds=1.0)))
    result = next(e for e in events if isinstance(e, ToolResult)).observation
    assert result.error
    assert "1 s" in result.text
    assert events[-1].trajectory.answer == "144"


@pytest.fixture
def make_with(base):
    """An agent of the tools given, with a script."""

    def make_agent(toolbox, script, limits=None):
        return Agent(ScriptedEngine(base.tokenizer, script), TapoDialect(base.tokenizer), toolbox, limits)

    return make_agent


@tool
async def shout(words: str, config: RunnableConfig, times: int = 1) -> str:
    """Say it louder."""
    return " ".join([words.upper()] * times) + f" for {context_of(config).owner or 'nobody'}"


def calling(text):
    return f"<think>Call it.</think>\n<call>{text}</call>"


async def test_a_further_tool_is_called_by_name(make_with):
    agent = make_with(Toolbox([shout]), in_turn(calling('{"name": "shout", "arguments": {"words": "hi"}}'), ANSWER))
    events = await run(agent, context=ToolContext("ann"))
    call = next(e for e in events if isinstance(e, ToolCall))
    assert (call.tool, call.input) == ("shout", '{"words": "hi"}')
    trajectory = events[-1].trajectory
    step = trajectory.steps[0]
    assert (step.action, step.input) == ("call", '{"name": "shout", "arguments": {"words": "hi"}}')
    assert (step.observation.tool, step.observation.text) == ("shout", "HI for ann")
    assert trajectory.tool_calls == 1
    assert trajectory.well_formed


@pytest.mark.parametrize(
    ("text", "action", "says", "calls"),
    [
        ("shout hi", "invalid", "Malformed call", 0),
        ('{"name": "whisper", "arguments": {}}', "call", "There is no tool 'whisper'. The tools are: shout.", 1),
        (
            '{"name": "shout", "arguments": {"word": "hi"}}',
            "call",
            "Wrong arguments for shout: words: Field required",
            1,
        ),
        ('{"name": "shout", "arguments": {"words": "hi", "times": "x"}}', "call", "times: Input should be a valid", 1),
        ('{"name": "code", "arguments": {"code": "1"}}', "call", "The tool code is off.", 1),
    ],
)
async def test_a_wrong_call_is_corrected_and_may_be_mended(make_with, text, action, says, calls):
    events = await run(make_with(Toolbox([shout]), in_turn(calling(text), ANSWER)))
    trajectory = events[-1].trajectory
    step = trajectory.steps[0]
    assert step.action == action
    assert step.observation.error
    assert says in step.observation.text
    assert (trajectory.tool_calls, trajectory.tool_errors) == (calls, calls)
    assert trajectory.answer == "144"


async def test_an_answer_may_use_and_is_shown_only_what_is_allowed(make_with):
    contexts = []

    def script(context):
        contexts.append(context)
        return [calling('{"name": "shout", "arguments": {"words": "hi"}}'), CODE, ANSWER][len(contexts) - 1]

    events = await run(make_with(Toolbox([PythonTool(), shout]), script), allowed=("code",))
    assert "shout" not in contexts[0]
    first, second = (e.observation for e in events if isinstance(e, ToolResult))
    assert first.error
    assert "There is no tool 'shout'. The tools are: code." in first.text
    assert second.text == "144"


async def test_a_tool_that_comes_in_mid_answer_waits_for_the_next(make_with):
    toolbox = Toolbox([PythonTool()])

    def script(context):
        if shout.name not in toolbox:
            toolbox.add([shout])
            return calling('{"name": "shout", "arguments": {"words": "hi"}}')
        return ANSWER

    agent = make_with(toolbox, script)
    assert "There is no tool 'shout'" in (await run(agent))[-1].trajectory.steps[0].observation.text
    assert "shout" in agent.dialect.tokenizer.decode(agent.render(ASK))


async def test_a_replayed_result_is_cut_to_the_budget(make):
    async def replay(tool, text):
        return Observation(tool, "word " * 1000)

    agent = make(in_turn(CODE, ANSWER), Limits(observation_tokens=20))
    step = (await run(agent, call=replay))[-1].trajectory.steps[0]
    assert step.mask.count(0) < 40
    assert step.observation.text.endswith(" [cut]")


async def test_tool_results_can_be_replayed(make):
    async def replay(tool, text):
        return Observation(tool, "from the record")

    trajectory = (await run(make(in_turn(CODE, ANSWER)), call=replay))[-1].trajectory
    assert trajectory.steps[0].observation.text == "from the record"


async def test_a_prompt_that_leaves_no_room_is_refused_before_any_token(make):
    agent = make(in_turn(ANSWER), context=512)
    with pytest.raises(PromptTooLong, match="Shorten"):
        await run(agent, [{"role": "user", "content": "word " * 2000}])


async def test_a_long_result_never_overruns_the_context(make):
    flood = "<think>x</think>\n<code>print('word ' * 5000)</code>"
    agent = make(lambda context: flood, Limits(max_turns=20, observation_tokens=200), context=700)
    trajectory = (await run(agent))[-1].trajectory
    assert trajectory.stop_reason == "length"
    assert len(trajectory.prompt_ids) + len(trajectory.completion_ids) <= 700


async def test_closing_the_events_aborts_the_engine(make):
    agent = make(in_turn(ANSWER))
    agent.engine.delay = 0.02
    stream = agent.answer(ASK, "v0", Sampling())
    await anext(stream)
    await stream.aclose()
    assert agent.engine.aborted == 1


async def test_an_answer_cut_by_the_token_limit_ends_there(make):
    long = "<think>Go.</think>\n<answer>" + "one two three " * 40 + "</answer>"
    events = await run(make(lambda context: long), sampling=Sampling(max_tokens=40))
    trajectory = events[-1].trajectory
    assert trajectory.stop_reason == "length"
    assert len(trajectory.steps) == 1
    assert not trajectory.well_formed
