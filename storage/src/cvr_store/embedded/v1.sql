-- A file of format version 1, with one group.
CREATE TABLE groups (
  num INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  version TEXT NOT NULL,
  last_active REAL NOT NULL,
  ttl_clock REAL NOT NULL,
  replica_version TEXT,
  owner TEXT,
  granted REAL,
  client_schema INTEGER,
  profile TEXT,
  next_query INTEGER NOT NULL DEFAULT 0,
  deleted INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX groups_by_activity ON groups (deleted, last_active);
CREATE TABLE schemas (num INTEGER PRIMARY KEY, json TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE clients (
  grp INTEGER NOT NULL,
  id TEXT NOT NULL,
  PRIMARY KEY (grp, id)
) STRICT, WITHOUT ROWID;
CREATE TABLE queries (
  grp INTEGER NOT NULL,
  hash TEXT NOT NULL,
  num INTEGER NOT NULL,
  kind INTEGER NOT NULL,
  body TEXT NOT NULL,
  args TEXT,
  patch TEXT,
  transformation_hash TEXT,
  transformation_version TEXT,
  signature INTEGER,
  deleted INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (grp, hash)
) STRICT, WITHOUT ROWID;
CREATE TABLE desires (
  grp INTEGER NOT NULL,
  client TEXT NOT NULL,
  query TEXT NOT NULL,
  patch TEXT NOT NULL,
  deleted INTEGER NOT NULL,
  ttl REAL,
  inactivated REAL,
  PRIMARY KEY (grp, client, query)
) STRICT, WITHOUT ROWID;
CREATE TABLE rows (
  grp INTEGER NOT NULL,
  id TEXT NOT NULL,
  row_version TEXT NOT NULL,
  patch TEXT NOT NULL,
  refs BLOB,
  PRIMARY KEY (grp, id)
) STRICT, WITHOUT ROWID;
PRAGMA application_id = 2054308694;
PRAGMA user_version = 1;
INSERT INTO groups (id, version, last_active, ttl_clock) VALUES ('g', '00:01', 1794000000000.9, 5);
