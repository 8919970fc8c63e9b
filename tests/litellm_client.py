"""What a program with litellm does, in an environment of its own: `python litellm_client.py URL` prints JSON.

It runs by itself and imports nothing of Whetstone's, whose parts want other versions of packages than litellm does.
"""

import json
import os
import socket
import sys

os.environ["LITELLM_OFFLINE_MODE"] = "true"  # else it fetches a price list when it is imported
URL = sys.argv[1]
asked_for: set[str] = set()
_getaddrinfo = socket.getaddrinfo


def getaddrinfo(host, *args, **kwargs):  # type: ignore[no-untyped-def]
    asked_for.add(str(host))
    return _getaddrinfo(host, *args, **kwargs)


socket.getaddrinfo = getaddrinfo

import litellm  # noqa: E402

SUM = [{"role": "user", "content": "What is 6 * 7?"}]
ROME = [{"role": "user", "content": "How is the weather in Rome?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": CITY}}
TO = {"model": "openai/whetstone", "api_base": URL, "api_key": "any", "num_retries": 0}

whole = litellm.completion(messages=SUM, **TO)
streamed = list(litellm.completion(messages=SUM, stream=True, **TO))
asked = litellm.completion(messages=ROME, tools=[WEATHER], **TO).choices[0].message
call = asked.tool_calls[0]
result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
told = litellm.completion(messages=[*ROME, asked.model_dump(), result], tools=[WEATHER], **TO)
called = litellm.stream_chunk_builder(list(litellm.completion(messages=ROME, tools=[WEATHER], stream=True, **TO)))
response = litellm.responses(input="What is 6 * 7?", **TO)
on = litellm.responses(input="And 2 * 3?", previous_response_id=response.id, **TO)
events = list(litellm.responses(input="What is 6 * 7?", stream=True, **TO))
try:
    litellm.completion(messages=SUM, logit_bias={"5": 1}, **TO)
    refused = ""
except litellm.BadRequestError as error:
    refused = str(error)

print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "model": whole.model,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in streamed),
            "call": [call.function.name, json.loads(call.function.arguments)],
            "told": told.choices[0].message.content,
            "streamed_call": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
            "response": response.output[0].content[0].text,
            "on": on.status,
            "events": [str(getattr(event.type, "value", event.type)) for event in events],
            "refused": refused,
            "asked_for": sorted(asked_for),
        }
    )
)
