-- A CVR schema of version 6 with contents, as far as the steps from there on can tell.
CREATE SCHEMA "zero_0/cvr";
CREATE TABLE "zero_0/cvr"."versionHistory" (
  "dataVersion" INT NOT NULL,
  "schemaVersion" INT NOT NULL,
  "minSafeVersion" INT NOT NULL,
  "lock" CHAR(1) NOT NULL DEFAULT 'v',
  CONSTRAINT "pk_schema_meta_lock" PRIMARY KEY ("lock"),
  CONSTRAINT "ck_schema_meta_lock" CHECK ("lock" = 'v')
);
INSERT INTO "zero_0/cvr"."versionHistory" VALUES (6, 6, 3);
CREATE TABLE "zero_0/cvr"."instances" (
  "clientGroupID" TEXT PRIMARY KEY,
  "version" TEXT NOT NULL,
  "lastActive" TIMESTAMPTZ NOT NULL,
  "replicaVersion" TEXT,
  "owner" TEXT,
  "grantedAt" TIMESTAMPTZ
);
CREATE TABLE "zero_0/cvr"."clients" (
  "clientGroupID" TEXT,
  "clientID" TEXT,
  "patchVersion" TEXT NOT NULL,
  "deleted" BOOL,
  PRIMARY KEY ("clientGroupID", "clientID"),
  CONSTRAINT "fk_clients_client_group" FOREIGN KEY ("clientGroupID")
    REFERENCES "zero_0/cvr"."instances" ("clientGroupID")
);
CREATE INDEX "client_patch_version" ON "zero_0/cvr"."clients" ("patchVersion");
CREATE TABLE "zero_0/cvr"."queries" (
  "clientGroupID" TEXT,
  "queryHash" TEXT,
  "clientAST" JSONB NOT NULL,
  "patchVersion" TEXT,
  "transformationHash" TEXT,
  "transformationVersion" TEXT,
  "internal" BOOL,
  "deleted" BOOL,
  PRIMARY KEY ("clientGroupID", "queryHash"),
  CONSTRAINT "fk_queries_client_group" FOREIGN KEY ("clientGroupID")
    REFERENCES "zero_0/cvr"."instances" ("clientGroupID")
);
CREATE INDEX "queries_patch_version" ON "zero_0/cvr"."queries" ("patchVersion" NULLS FIRST);
CREATE TABLE "zero_0/cvr"."desires" (
  "clientGroupID" TEXT,
  "clientID" TEXT,
  "queryHash" TEXT,
  "patchVersion" TEXT NOT NULL,
  "deleted" BOOL,
  PRIMARY KEY ("clientGroupID", "clientID", "queryHash"),
  CONSTRAINT "fk_desires_client" FOREIGN KEY ("clientGroupID", "clientID")
    REFERENCES "zero_0/cvr"."clients" ("clientGroupID", "clientID"),
  CONSTRAINT "fk_desires_query" FOREIGN KEY ("clientGroupID", "queryHash")
    REFERENCES "zero_0/cvr"."queries" ("clientGroupID", "queryHash") ON DELETE CASCADE
);
CREATE INDEX "desires_patch_version" ON "zero_0/cvr"."desires" ("patchVersion");
CREATE TABLE "zero_0/cvr"."rowsVersion" (
  "clientGroupID" TEXT PRIMARY KEY,
  "version" TEXT NOT NULL
);
CREATE TABLE "zero_0/cvr"."rows" (
  "clientGroupID" TEXT,
  "schema" TEXT,
  "table" TEXT,
  "rowKey" JSONB,
  "rowVersion" TEXT NOT NULL,
  "patchVersion" TEXT NOT NULL,
  "refCounts" JSONB,
  PRIMARY KEY ("clientGroupID", "schema", "table", "rowKey")
);
CREATE INDEX "row_patch_version" ON "zero_0/cvr"."rows" ("patchVersion");
CREATE INDEX "row_ref_counts" ON "zero_0/cvr"."rows" USING GIN ("refCounts");

INSERT INTO "zero_0/cvr"."instances" VALUES ('g', '05:01', '2026-01-01Z', '01', 'old', '2026-01-01Z');
INSERT INTO "zero_0/cvr"."clients" VALUES ('g', 'c', '00:01', false);
INSERT INTO "zero_0/cvr"."queries" VALUES
  ('g', 'q', '{"table": "issue", "orderBy": [["id", "asc"]]}', '05', 'h', '05', NULL, false);
INSERT INTO "zero_0/cvr"."desires" VALUES ('g', 'c', 'q', '00:01', false);
INSERT INTO "zero_0/cvr"."rowsVersion" VALUES ('g', '05:01');
INSERT INTO "zero_0/cvr"."rows" VALUES ('g', '', 'issue', '{"id": 1}', '04', '05', '{"q": 1}');
