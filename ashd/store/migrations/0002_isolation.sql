-- What the jail lets runners say of themselves, and sessions of their sandbox.
--
-- Safe while 0001's code runs: every column has a default, and that code names the columns it writes.

ALTER TABLE runners
    -- strict, standard or none, as its self-test showed; '' = it has not said.
    ADD COLUMN isolation text NOT NULL DEFAULT '',
    -- Why it admits no session now; '' = it does.
    ADD COLUMN refusing text NOT NULL DEFAULT '',
    ADD COLUMN used_pss_bytes bigint NOT NULL DEFAULT 0,
    ADD COLUMN used_cpu_seconds double precision NOT NULL DEFAULT 0,
    ADD COLUMN used_processes int NOT NULL DEFAULT 0,
    ADD COLUMN used_descriptors int NOT NULL DEFAULT 0,
    ADD COLUMN used_disk_bytes bigint NOT NULL DEFAULT 0,
    -- Counts since the runner started: {"process": 1, …}, {"oom": 2, …}.
    ADD COLUMN orphans jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN kills jsonb NOT NULL DEFAULT '{}';

ALTER TABLE sessions
    -- Of its last sandbox; null = it had none, or its runner does not say.
    ADD COLUMN isolation text,
    -- The limits that sandbox really has, as JSON with the names of `limits`.
    ADD COLUMN effective_limits text;
