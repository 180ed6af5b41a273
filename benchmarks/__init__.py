"""What this project costs beside what it replaces, measured on real servers: ``make bench``, docs/benchmarks.md.

One module per bench, each with ``run(stage) -> list[Row]``; ``stage`` has the servers, ``figures`` the arithmetic,
``load`` the events. What is measured runs in processes of its own (``*_child``), never in the one that measures.
"""
