"""``isthmus ca``: the cluster's certificate authority."""

import time
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.configuration import holder_name
from isthmus.cli.relay import serve
from isthmus.model.errors import UsageError
from isthmus.model.settings import RelaySettings
from isthmus.relay import authority
from isthmus.wire import identity

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Make the certificate authority, or serve it.")

LONGEST_CLUSTER_NAME = 64
"""What fits into the common name of a certificate (RFC 5280, appendix A: ub-common-name)."""

Directory = Annotated[
    Path,
    typer.Option("--dir", envvar="ISTHMUS_CA_DIRECTORY", help="The authority's directory.", metavar="DIR"),
]


@app.command("init")
def init(
    directory: Directory = authority.DEFAULT_DIRECTORY,
    cluster: Annotated[str, typer.Option("--cluster", help="The cluster's name, for people.")] = "isthmus",
) -> None:
    """Make a new authority. Refuses to touch one that is there."""
    if not cluster.isprintable() or not 0 < len(cluster) <= LONGEST_CLUSTER_NAME:
        raise UsageError(f"a cluster's name has 1 to {LONGEST_CLUSTER_NAME} printable characters")
    made = authority.init(directory, cluster, now_s=time.time())
    print(f"authority of cluster {cluster} made in {directory}")
    print(f"SHA-256 {identity.fingerprint(made.certificate)}")
    print("The directory is the cluster's root of trust: keep it on one machine, and keep a copy of it offline.")


@app.command("serve")
def serve_issuer(
    directory: Directory = authority.DEFAULT_DIRECTORY,
    listen: Annotated[str, typer.Option("--listen", help="Address and port.", metavar="HOST:PORT")] = "0.0.0.0:20004",
    name: Annotated[str, typer.Option("--name", help="The issuer's name in its certificate.")] = "issuer",
    hours: Annotated[float, typer.Option("--certificate-hours", min=0.001, help="Life of what is issued.")] = 24.0,
    state_directory: Annotated[
        Path, typer.Option("--state-directory", help="Where its own certificate is kept.", metavar="DIR")
    ] = Path("/var/lib/isthmus-issuer"),
    run_directory: Annotated[
        Path, typer.Option("--run-directory", help="Where its status socket is.", metavar="DIR")
    ] = Path("/run/isthmus-issuer"),
) -> None:
    """Enrol and renew, without a relay. A relay with `issuer: true` does the same on its own port."""
    settings = RelaySettings(
        name=holder_name(name),
        listen=listen,
        state_directory=str(state_directory),
        run_directory=str(run_directory),
        ca_directory=str(directory),
        certificate_hours=hours,
    )
    serve(settings, relays=False)


@app.command("show")
def show(directory: Directory = authority.DEFAULT_DIRECTORY) -> None:
    """Print the authority's fingerprint, its end, and the number of its revocation list."""
    opened = authority.Authority(directory)
    end = time.strftime("%Y-%m-%d", time.gmtime(identity.expiry_s(opened.certificate)))
    print(f"SHA-256 {identity.fingerprint(opened.certificate)}")
    print(f"valid until {end}")
    print(f"{opened.certificate.subject.rfc4514_string()}")
