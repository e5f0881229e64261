"""Pages in one file without outside parts, from Jinja templates that include `page.css`."""

from pathlib import Path
from typing import Any

import jinja2


def page_template(path: Path) -> Any:
    """A template for HTML: values are escaped, and a name that was not given is an error."""
    folders = [path.parent, Path(__file__).parent]
    return jinja2.Environment(loader=jinja2.FileSystemLoader(folders), autoescape=True,
                              undefined=jinja2.StrictUndefined).get_template(path.name)
