"""What a person should know, by stable code; an empty text clears it."""

from collections.abc import Iterable

from isthmus.model.findings import Finding, Severity
from isthmus.wire.local import TroubleRow


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
        rows += [TroubleRow(finding.code, finding.severity, str(finding)) for finding in findings if finding.is_problem]
        return sorted(rows, key=lambda row: (row.severity != Severity.ERROR, row.code, row.text))
