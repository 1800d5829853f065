"""The catalog, held against one built anew: incremental reading must not show."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from isthmus.model.cluster import Key, Object
from isthmus.model.findings import Finding
from isthmus.model.manifests import parse_document
from isthmus.store.catalog import Catalog
from isthmus.store.cutting import cut
from isthmus.store.filestate import Before, FileState, document_of, evaluate


def document(name: str, address: int, spare_lines: int) -> str:
    return (
        "# a comment\n" * spare_lines
        + f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n"
        + f"spec: {{clusterIP: 10.96.0.{address}, ports: [{{port: 80}}]}}\n"
    )


def endpoints(name: str, address: int, subsets: int) -> str:
    entries = "".join(f"- addresses: [{{ip: 172.17.0.{address}, nodeName: n{i}}}]\n" for i in range(subsets))
    return f"apiVersion: v1\nkind: Endpoints\nmetadata: {{name: {name}}}\nsubsets:\n{entries}"


NAMES, ADDRESSES = st.sampled_from("abc"), st.integers(1, 3)
GOOD = st.one_of(
    st.builds(document, NAMES, ADDRESSES, st.integers(0, 2)), st.builds(endpoints, NAMES, ADDRESSES, st.integers(0, 2))
)
BROKEN = st.sampled_from(["{ broken\n", document("a", 999, 0), document("b", 999, 1)])
FILES = st.sampled_from(["x.yaml", "y.yaml", "sub/z.yaml"])


def read(file: str, text: str, before: FileState | None) -> FileState:
    earlier = Before(before) if before else None
    documents = []
    made = cut(text)
    for piece in made.pieces:
        known = earlier.find(piece) if earlier else None
        documents.append(known or document_of(piece, parse_document(made.document(piece)), file))
    return evaluate(file, tuple(documents), before)


class Incremental(RuleBasedStateMachine):
    """Files come, change, break and go; followers see every difference and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog()
        self.texts: dict[str, str] = {}
        self.followed: dict[Key, Object] = {}

    @rule(file=FILES, documents=st.lists(GOOD, max_size=4))
    def write(self, file: str, documents: list[str]) -> None:
        self.put(file, "---\n".join(documents))

    @rule(file=FILES, documents=st.lists(GOOD, max_size=2), broken=BROKEN)
    def break_(self, file: str, documents: list[str], broken: str) -> None:
        self.put(file, "---\n".join([*documents, broken]))

    @rule(file=FILES)
    def remove(self, file: str) -> None:
        self.texts.pop(file, None)
        self.catalog.remove(file)

    def put(self, file: str, text: str) -> None:
        self.texts[file] = text
        self.catalog.replace(read(file, text, self.catalog.files.get(file)))

    @rule()
    def follow(self) -> None:
        difference = self.catalog.take()
        for obj in difference.put:
            assert self.followed.get(obj.key) != obj
            self.followed[obj.key] = obj
        for obj in difference.moved:
            assert obj.key in self.followed
            self.followed[obj.key] = obj
        for key in difference.dropped:
            del self.followed[key]
        assert not self.catalog.take()
        self.compare()

    def compare(self) -> None:
        """Without broken files nothing of the history shows; with them, only objects that are kept are more."""
        anew = Catalog()
        for file in sorted(self.texts):
            anew.replace(read(file, self.texts[file], None))
        fresh = {obj.key: obj for obj in anew.take().put}
        if not any(state.broken_documents for state in self.catalog.files.values()):
            assert self.followed == fresh
            assert self.catalog.findings() == anew.findings()
        else:
            assert fresh.keys() <= self.followed.keys()
            kept = {key for state in self.catalog.files.values() for key in state.retained}
            assert len(self.followed.keys() - fresh.keys()) == 0 or kept

    @invariant()
    def totals_are_sums(self) -> None:
        states = self.catalog.files.values()
        assert self.catalog.totals.documents == sum(len(state.documents) for state in states)
        assert self.catalog.totals.retained == sum(len(state.retained) for state in states)
        assert self.catalog.totals.broken_documents == sum(state.broken_documents for state in states)

    @invariant()
    def findings_name_existing_lines(self) -> None:
        for finding in self.catalog.findings():
            self.check_line(finding)

    def check_line(self, finding: Finding) -> None:
        assert 1 <= finding.line <= self.texts[finding.file].count("\n") + 2


TestIncremental = Incremental.TestCase
TestIncremental.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


def test_a_broken_file_keeps_an_object_only_until_another_file_defines_it() -> None:
    catalog = Catalog()
    catalog.replace(read("x.yaml", document("a", 1, 0), None))
    catalog.replace(read("x.yaml", "{ broken", catalog.files["x.yaml"]))
    catalog.take()
    catalog.replace(read("z.yaml", document("a", 2, 0), None))
    (obj,) = catalog.take().put
    assert obj.source.file == "z.yaml"
    assert [finding.file for finding in catalog.findings()] == ["x.yaml"]
