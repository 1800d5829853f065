"""What to do about each trouble: one entry a stable code. docs/errors.md lists the same codes; a test compares them.

Codes come from the agent and its workers; a code that is not here is shown with its text alone.
"""

ADVICE = {
    "store.problem": "correct the named file; until then the last good state of its objects is served",
}


def advice_for(code: str) -> str:
    """What to do about the trouble ``code``, or '' where nothing more can be said than its text."""
    return ADVICE.get(code, "")
