-- The tables of the first version.
--
-- Text columns that hold JSON are text on purpose: jsonb refuses \u0000 and lone surrogates, which agents do print.
-- sessions.runner_id is not null exactly while the session holds a slot of that runner.

CREATE TABLE server_keys (
    name text PRIMARY KEY,
    secret bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_keys (
    id uuid PRIMARY KEY,
    tenant_id text NOT NULL,
    label text NOT NULL DEFAULT '',
    key_hash text NOT NULL,
    key_prefix text NOT NULL,
    -- 'initial' for the key minted at first start: unique, so that it is minted once.
    origin text,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX api_keys_hash ON api_keys (key_hash);
CREATE UNIQUE INDEX api_keys_origin ON api_keys (origin) WHERE origin IS NOT NULL;
CREATE INDEX api_keys_tenant ON api_keys (tenant_id);

CREATE TABLE bundles (
    digest text PRIMARY KEY,
    size_bytes bigint NOT NULL,
    chunk_count int NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE bundle_chunks (
    digest text NOT NULL REFERENCES bundles (digest) ON DELETE CASCADE,
    number int NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (digest, number)
);

CREATE TABLE agents (
    id uuid PRIMARY KEY,
    tenant_id text NOT NULL,
    name text NOT NULL,
    version int NOT NULL DEFAULT 1,
    path text NOT NULL DEFAULT '',
    bundle_digest text NOT NULL REFERENCES bundles (digest),
    -- What agent.yaml says, as JSON: runtime, entry, limits, network, preload, env, idleTimeoutMs, turnTimeoutMs.
    spec text NOT NULL,
    env text NOT NULL DEFAULT '{}',
    config text NOT NULL DEFAULT '{}',
    turn_timeout_ms bigint,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX agents_name ON agents (tenant_id, name);
CREATE INDEX agents_bundle ON agents (bundle_digest);

CREATE TABLE runners (
    id text PRIMARY KEY,
    host text NOT NULL,
    port int NOT NULL,
    address text NOT NULL,
    version text NOT NULL DEFAULT '',
    enforced text[] NOT NULL DEFAULT '{}',
    max_sandboxes int NOT NULL,
    -- Slots taken: sandboxes reported live by the last heartbeat plus those reserved for sessions still starting.
    active int NOT NULL DEFAULT 0,
    warming int NOT NULL DEFAULT 0,
    warm int NOT NULL DEFAULT 0,
    running int NOT NULL DEFAULT 0,
    waiting int NOT NULL DEFAULT 0,
    paused int NOT NULL DEFAULT 0,
    warm_hits bigint NOT NULL DEFAULT 0,
    cold_starts bigint NOT NULL DEFAULT 0,
    memory_total_bytes bigint NOT NULL DEFAULT 0,
    memory_used_bytes bigint NOT NULL DEFAULT 0,
    memory_per_sandbox_bytes bigint NOT NULL DEFAULT 0,
    draining boolean NOT NULL DEFAULT false,
    registered_at timestamptz NOT NULL DEFAULT now(),
    last_heartbeat_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE sessions (
    id uuid PRIMARY KEY,
    tenant_id text NOT NULL,
    -- No foreign key: a session outlives its agent, and keeps all it needs of it.
    agent_id uuid NOT NULL,
    agent_name text NOT NULL,
    status text NOT NULL,
    status_cause text,
    epoch bigint NOT NULL DEFAULT 1,
    runner_id text,
    sandbox_id uuid,
    placed_at timestamptz NOT NULL DEFAULT now(),
    parent_session_id uuid,
    model text,
    settings text NOT NULL DEFAULT '{}',
    env text NOT NULL DEFAULT '{}',
    limits text NOT NULL DEFAULT '{}',
    labels jsonb NOT NULL DEFAULT '{}',
    bundle_digest text NOT NULL,
    -- The agent's spec and env as they were when the session was created.
    agent_spec text NOT NULL,
    agent_env text NOT NULL DEFAULT '{}',
    turn_timeout_ms bigint,
    last_seq bigint NOT NULL DEFAULT 0,
    turn_count int NOT NULL DEFAULT 0,
    open_turn_id uuid,
    generation bigint,
    idempotency_key text,
    request_hash text,
    created_at timestamptz NOT NULL DEFAULT now(),
    last_active_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz
);
CREATE UNIQUE INDEX sessions_idempotency ON sessions (tenant_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX sessions_tenant ON sessions (tenant_id, created_at DESC, id DESC);
CREATE INDEX sessions_tenant_agent ON sessions (tenant_id, agent_name, created_at DESC, id DESC);
CREATE INDEX sessions_tenant_status ON sessions (tenant_id, status, created_at DESC, id DESC);
CREATE INDEX sessions_runner ON sessions (runner_id, status) WHERE runner_id IS NOT NULL;
CREATE INDEX sessions_starting ON sessions (placed_at) WHERE status = 'starting';
CREATE INDEX sessions_keyed ON sessions (created_at) WHERE idempotency_key IS NOT NULL;

CREATE TABLE turns (
    id uuid PRIMARY KEY,
    session_id uuid NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    tenant_id text NOT NULL,
    number int NOT NULL,
    epoch bigint NOT NULL,
    state text NOT NULL DEFAULT 'accepted',
    outcome text,
    error text,
    error_code text,
    -- {"content": …, "options": …} until the turn is launched: then the user message among the events holds it.
    request text,
    timeout_ms bigint NOT NULL,
    first_seq bigint,
    last_seq bigint,
    usage text,
    idempotency_key text,
    request_hash text,
    created_at timestamptz NOT NULL DEFAULT now(),
    launched_at timestamptz,
    settled_at timestamptz
);
CREATE UNIQUE INDEX turns_session ON turns (session_id, number);
CREATE UNIQUE INDEX turns_idempotency ON turns (session_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX turns_accepted ON turns (created_at) WHERE state = 'accepted';
CREATE INDEX turns_keyed ON turns (created_at) WHERE idempotency_key IS NOT NULL;

CREATE TABLE events (
    session_id uuid NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    seq bigint NOT NULL,
    epoch bigint NOT NULL,
    turn_id uuid,
    kind smallint NOT NULL,
    type text NOT NULL,
    data text NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (session_id, seq)
);

CREATE TABLE coordinators (
    id text PRIMARY KEY,
    registry_address text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz NOT NULL DEFAULT now()
);
