"""Interception as the agent keeps it: probed once, applied when something changed, compared with the kernel."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import structlog

from isthmus.kernel.interception import Interception, Reading
from isthmus.kernel.original_destination import Finding, Method
from isthmus.model.errors import IsthmusError
from isthmus.model.settings import AgentSettings
from isthmus.plan.interception import (
    Capabilities,
    Handover,
    InterceptionPlan,
    ignored_addresses,
    plan_interception,
    preserved_endpoints,
)
from isthmus.plan.serving import ServicePlan
from isthmus.wire.local import InterceptionStatus

log = structlog.get_logger(__name__)


class Interceptor:
    """The interception of this node. Kernel work runs in a thread, one at a time."""

    def __init__(self, settings: AgentSettings, state_directory: Path) -> None:
        self._settings = settings
        self._state_directory = state_directory
        self._kernel: Interception | None = None
        self._finding: Finding | None = None
        self._capabilities = Capabilities()
        self._verify = True
        self._lock = asyncio.Lock()
        self._repairs = 0
        self._error = ""
        self.plan: InterceptionPlan | None = None
        self.active = False
        self._applied_once = False

    async def probe(self, boot_id: str) -> None:
        """Learn what this kernel can do. Raises KernelError, also where no backend works."""
        self._kernel = Interception(self._settings.intercept, self._state_directory, boot_id)
        self._finding = await asyncio.to_thread(self._kernel.finding)
        self._capabilities = await asyncio.to_thread(self._kernel.capabilities)
        self.plan = self._plan((), ())
        if self._finding.reason:
            log.warning("original destination", reason=self._finding.reason, stuck_child=self._finding.stuck_pid)

    @property
    def handover(self) -> Handover:
        """How the kernel hands connections to the proxy."""
        assert self.plan is not None
        return self.plan.handover

    @property
    def by_record(self) -> bool:
        """Whether conntrack's record must tell the original destination, because the socket option must not be used."""
        assert self._finding is not None
        return self.handover is Handover.DNAT and self._finding.method is not Method.GETSOCKOPT

    @property
    def addresses(self) -> tuple[str, ...]:
        """The interception addresses in use: IPv4, and IPv6 where this kernel has it."""
        assert self.plan is not None
        return tuple(address for address in (self.plan.address_v4, self.plan.address_v6) if address)

    def suspect(self) -> None:
        """Compare with the kernel at the next ``apply``."""
        self._verify = True

    async def apply(self, services: Iterable[ServicePlan], own_addresses: Iterable[str]) -> None:
        """Make the kernel hold what ``services`` ask for. Raises KernelError; the next call compares everything."""
        async with self._lock:
            assert self._kernel is not None
            verify, self._verify = self._verify, False
            first, self._applied_once = not self._applied_once, True
            try:
                if verify:
                    self._capabilities = await asyncio.to_thread(self._kernel.capabilities)
                plan = self._plan(services, own_addresses)
                report = await asyncio.to_thread(self._kernel.apply, plan, verify=verify)
            except IsthmusError as error:
                self._verify, self._error = True, str(error)
                raise
            self._error = ""
            if report.changed:
                repaired = verify and not first and plan == self.plan
                self._repairs += repaired
                log.info("interception repaired" if repaired else "interception changed", what=list(report.changed))
            self.plan = plan

    def remove(self) -> None:
        """Take everything away; for a clean stop."""
        if self._kernel is not None:
            self.active = self._applied_once = False
            log.info("interception removed", what=list(self._kernel.remove().changed))

    async def read(self) -> Reading:
        """What the kernel holds now."""
        async with self._lock:
            assert self._kernel is not None
            return await asyncio.to_thread(self._kernel.read)

    async def status(self) -> InterceptionStatus:
        """For ``status``."""
        assert self.plan is not None and self._finding is not None and self._kernel is not None
        plan, intercept = self.plan, self._settings.intercept
        sysctls = await asyncio.to_thread(self._kernel.sysctl_changes)
        method = "conntrack" if self.by_record else "tproxy" if self.handover is Handover.TPROXY else "so-original-dst"
        return InterceptionStatus(
            backend=plan.backend,
            original_destination=method,
            reason="; ".join(note.text for note in plan.notes),
            device=plan.device,
            address_v4=plan.address_v4,
            address_v6=plan.address_v6,
            port=intercept.port,
            ranges=[*plan.service_ranges, *plan.virtual_ranges],
            ignored=len(plan.ignored),
            applied=self.active and not self._error,
            repairs=self._repairs,
            sysctls=[f"{change.name}: {change.before} -> {change.ours}" for change in sysctls],
            error=self._error,
        )

    def _plan(self, services: Iterable[ServicePlan], own_addresses: Iterable[str]) -> InterceptionPlan:
        services = tuple(services)
        return plan_interception(
            self._settings.intercept,
            self._settings.virtual_cidrs,
            ignored_addresses(services),
            preserved_endpoints(services, self._settings.node),
            own_addresses,
            self._capabilities,
        )
