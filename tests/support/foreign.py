"""A process in which this package, and nobody else, finds no module that Windows lacks.

`sys.modules["fcntl"] = None` would not do: libraries that ask `sys.platform` import it all the same.
"""

MISSING = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "syslog")

# To stand before a program for `python -c`.
WITHOUT_POSIX = f"""
import builtins
real = builtins.__import__

def foreign(name, globals=None, *rest, **options):
    if name in {MISSING!r} and str((globals or {{}}).get("__name__")).startswith("redflag"):
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return real(name, globals, *rest, **options)

builtins.__import__ = foreign
"""
