"""Real servers for the tests: installed, started on free loopback ports, and never left behind.

One module per server (``kafka``, ``redis``), each with the same names: ``missing()``, ``install()`` and ``start()``.
To add a server, write such a module and add its line to ``catalogue``. The standard library only: this runs before
anything is installed, and ``preflight`` must be able to say "your Python is too old" *on* that Python.
"""
