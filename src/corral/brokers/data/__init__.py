"""The data broker: SQL over what a policy lets an agent see of databases. docs/brokers.md, "Data".

A query never reaches a database as it was written. ``reading`` parses it, ``grammar`` and ``checking`` refuse whatever
is not on a list, ``binding`` finds what its names mean within the scope, ``rewriting`` and ``writing`` make the text
that is run, in which each table is a subquery with nothing but the scope in it (``scope``), and ``lexical`` reads that
text once more. ``sessions`` and ``engine_*`` run it; ``broker`` is the door.
"""
