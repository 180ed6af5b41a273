"""A package only so that ``tests.services`` has one name, whoever imports it; test modules are not imported by name."""
