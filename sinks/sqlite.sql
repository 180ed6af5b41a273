-- What Celery's own SQL backend would create, by SQLAlchemy, so that `db+sqlite:///` reads it.
CREATE TABLE IF NOT EXISTS celery_taskmeta (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	task_id VARCHAR(155),
	status VARCHAR(50),
	result BLOB,
	date_done DATETIME,
	traceback TEXT,
	children BLOB,
	name VARCHAR(155),
	args BLOB,
	kwargs BLOB,
	worker VARCHAR(155),
	retries INTEGER,
	queue VARCHAR(155),
	stamps BLOB,
	UNIQUE (task_id)
);
CREATE INDEX IF NOT EXISTS ix_celery_taskmeta_date_done ON celery_taskmeta (date_done);
CREATE TABLE IF NOT EXISTS celery_tasksetmeta (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	taskset_id VARCHAR(155),
	result BLOB,
	date_done DATETIME,
	UNIQUE (taskset_id)
);
CREATE INDEX IF NOT EXISTS ix_celery_tasksetmeta_date_done ON celery_tasksetmeta (date_done);

-- Ours. Tables with documents have row ids: ids are random, and rows clustered by them cost twice the writing.
-- Times are ms since 1970; an expiry of 0 is never. One row per task or saved group:
-- k and event_id are the winner's, document is what it shows (until shown_until), the rest is the side record.
CREATE TABLE IF NOT EXISTS ckb_task (
	task_id TEXT NOT NULL PRIMARY KEY,
	k INTEGER NOT NULL DEFAULT 0,
	event_id TEXT NOT NULL DEFAULT '',
	document BLOB,
	shown_until INTEGER NOT NULL DEFAULT 0,
	expires_at INTEGER NOT NULL,
	run INTEGER NOT NULL,
	seen INTEGER NOT NULL,
	sent INTEGER NOT NULL,
	received INTEGER NOT NULL,
	started INTEGER NOT NULL,
	attempts INTEGER NOT NULL,
	workers TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS ckb_task_expires_at ON ckb_task (expires_at) WHERE expires_at > 0;
CREATE INDEX IF NOT EXISTS ckb_task_shown_until ON ckb_task (shown_until) WHERE shown_until > 0;
CREATE TABLE IF NOT EXISTS ckb_group (
	task_id TEXT NOT NULL PRIMARY KEY,
	k INTEGER NOT NULL DEFAULT 0,
	event_id TEXT NOT NULL DEFAULT '',
	document BLOB,
	shown_until INTEGER NOT NULL DEFAULT 0,
	expires_at INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS ckb_group_expires_at ON ckb_group (expires_at) WHERE expires_at > 0;
CREATE INDEX IF NOT EXISTS ckb_group_shown_until ON ckb_group (shown_until) WHERE shown_until > 0;
CREATE TABLE IF NOT EXISTS ckb_history (
	task_id TEXT NOT NULL,
	hlc INTEGER NOT NULL,
	event_id TEXT NOT NULL,
	kind TEXT NOT NULL,
	state TEXT,
	at INTEGER NOT NULL,
	value BLOB NOT NULL,
	expires_at INTEGER NOT NULL,
	PRIMARY KEY (task_id, hlc, event_id)
);
CREATE INDEX IF NOT EXISTS ckb_history_at ON ckb_history (at);
CREATE INDEX IF NOT EXISTS ckb_history_expires_at ON ckb_history (expires_at) WHERE expires_at > 0;
CREATE TABLE IF NOT EXISTS ckb_chord (
	group_id TEXT NOT NULL,
	name TEXT NOT NULL,
	k INTEGER NOT NULL,
	value BLOB NOT NULL,
	PRIMARY KEY (group_id, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ckb_chord_expiry (
	group_id TEXT NOT NULL PRIMARY KEY,
	expires_at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ckb_position (
	topic TEXT NOT NULL,
	partition INTEGER NOT NULL,
	next INTEGER NOT NULL,
	PRIMARY KEY (topic, partition)
) WITHOUT ROWID;
