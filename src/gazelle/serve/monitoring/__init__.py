"""The dashboard for Grafana and the alert rules for Prometheus that come with the server's metrics."""

from pathlib import Path

from gazelle.base.files import check_writable, write_text

FILES = ("grafana.json", "alerts.yml")


def write_monitoring(folder: Path) -> list[Path]:
    """Write both into `folder`, which is made if need be.

    Raises:
        OutputError: it cannot be written to.
    """
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        write_text(folder / name, (Path(__file__).parent / name).read_text(encoding="utf-8"))
    return [folder / name for name in FILES]
