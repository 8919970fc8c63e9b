"""Whether two servers answer alike: status, keys, types and the order of events, whatever the values."""

SOMETIMES = ("response_sent_to_client_ts", "cached_tokens_details")  # by whether it's the first event, or cached


def shape(value):
    """Keys and types, all the way down; of lists the first item."""
    if isinstance(value, dict):
        # Of token_id:5 and such keys, which are data, what stands before the colon.
        return {key.partition(":")[0]: shape(item) for key, item in value.items() if key not in SOMETIMES}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def within(ours, theirs):
    """Whether all that ours has stands in theirs too; with metrics on, SGLang adds its timings."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(key in theirs and within(item, theirs[key]) for key, item in ours.items())
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(within, ours, theirs))
    return ours == theirs


def events(text):
    return [line for line in text.split("\n") if line]
