"""The command line's entry: `gazelle …` and `python -m gazelle …`. Alone, the latter checks the installation."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 our fault, 2 the user's mistake, 130 interrupted.

    Training that a signal stopped exits with 130 (Ctrl-C) or 143 (SIGTERM) once it is saved, as `SystemExit`.
    """
    from gazelle.base.errors import GazelleError
    from gazelle.base.log import log_to_terminal
    from gazelle.cli.app import app

    log_to_terminal()
    try:
        return app(arguments, standalone_mode=False) or 0
    except GazelleError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 — the one place that speaks to the terminal itself
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # typer brings its own copy of click's exceptions, or uses click's: both know how to show themselves.
        if show := getattr(error, "show", None):
            show()
            return int(getattr(error, "exit_code", 2))
        if type(error).__name__ in ("Exit", "Abort"):
            return int(getattr(error, "exit_code", 1))
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["doctor"]))
