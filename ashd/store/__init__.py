"""The database: the only room that speaks SQL.

Holds: the pool, the migrations, and one module per table with its statements on top and typed functions below.
Never holds: a decision about sandboxes, HTTP, gRPC. State machines live in ashd.domain; each statement here repeats
their laws as a compare-and-set on status and epoch, so that two processes can never both win.
Runs in: coordinator workers (async), and `ashd migrate` (sync). Runners have no database.

SQL keeps to what PostgreSQL 14 and CockroachDB 24 both understand: no advisory locks, LISTEN, triggers or extensions,
and no table is modified twice by one statement. JSON that came from users or agents is stored as text: jsonb refuses
\\u0000 and lone surrogates, both of which agents do print.
"""
