"""What a person should know, by stable code; an empty text clears it."""

from collections.abc import Iterable

from isthmus.model.findings import Finding, Severity
from isthmus.wire.local import TroubleRow

MOST_OF_A_KIND = 5


class Troubles:
    """The troubles that hold now, each logged by whoever found it."""

    def __init__(self) -> None:
        self._rows: dict[str, TroubleRow] = {}

    def put(self, code: str, severity: str, text: str) -> None:
        """Set or clear one."""
        if text:
            self._rows[code] = TroubleRow(code, severity, text)
        else:
            self._rows.pop(code, None)

    def rows(self, *more: TroubleRow | None, findings: Iterable[Finding] = ()) -> list[TroubleRow]:
        """All of them, errors first; ``findings`` of the store are added, notes left out."""
        rows = [*self._rows.values(), *(row for row in more if row)]
        rows += _of_findings(finding for finding in findings if finding.is_problem)
        return sorted(rows, key=lambda row: (row.severity != Severity.ERROR, row.code, row.text))


def _of_findings(findings: Iterable[Finding]) -> list[TroubleRow]:
    """One row a finding; of many of a kind the first few, and how many more there are."""
    by_kind: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault((finding.code, finding.severity), []).append(finding)
    rows = []
    for (code, severity), alike in by_kind.items():
        rows += [TroubleRow(code, severity, str(finding)) for finding in alike[:MOST_OF_A_KIND]]
        if len(alike) > MOST_OF_A_KIND:
            rows.append(TroubleRow(code, severity, f"and {len(alike) - MOST_OF_A_KIND} more of this kind"))
    return rows
