"""The store: it can be read, it holds something, and nothing in it is broken."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok
from isthmus.explain.words import count_text, duration_text, join_text

SHOWN = 10


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    store = node.status.store
    problems = tuple(store.problems[:SHOWN])
    if store.offline:
        return Finding(
            State.WARNING,
            f"{store.path} cannot be read; the copy on disk is served",
            "see that the directory exists and is readable; until then no change is seen",
            problems,
        )
    if store.problems:
        text = f"{count_text(len(store.problems), 'problem')} in {store.path}; the last good state is served"
        return Finding(State.WARNING, text, "correct the named files; a change is live within a second", problems)
    objects = [count_text(count, kind) for kind, count in store.objects.items() if count]
    if not objects:
        return Finding(State.WARNING, f"{store.path} holds no objects", "put manifests there, or set “store”")
    return ok(f"{join_text(objects)}, changed {duration_text(node.now_s - store.changed_at)} ago")


CHECK = Check("store", "store", _run, ("agent",))
