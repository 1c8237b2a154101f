-- What @rocicorp/zero 1.9.0 makes of v6.sql (pg_dump, without contents).
CREATE SCHEMA "zero_0/cvr";
CREATE TABLE "zero_0/cvr".clients (
    "clientGroupID" text NOT NULL,
    "clientID" text NOT NULL
);
CREATE TABLE "zero_0/cvr".desires (
    "clientGroupID" text NOT NULL,
    "clientID" text NOT NULL,
    "queryHash" text NOT NULL,
    "patchVersion" text NOT NULL,
    deleted boolean,
    "inactivatedAt" timestamp with time zone,
    ttl interval,
    "inactivatedAtMs" double precision,
    "ttlMs" double precision
);
CREATE TABLE "zero_0/cvr".instances (
    "clientGroupID" text NOT NULL,
    version text NOT NULL,
    "lastActive" timestamp with time zone NOT NULL,
    "replicaVersion" text,
    owner text,
    "grantedAt" timestamp with time zone,
    "clientSchema" jsonb,
    "ttlClock" double precision DEFAULT 0 NOT NULL,
    "profileID" text,
    deleted boolean DEFAULT false
);
CREATE TABLE "zero_0/cvr".queries (
    "clientGroupID" text NOT NULL,
    "queryHash" text NOT NULL,
    "clientAST" jsonb,
    "patchVersion" text,
    "transformationHash" text,
    "transformationVersion" text,
    internal boolean,
    deleted boolean,
    "queryName" text,
    "queryArgs" json,
    "rowSetSignature" text
);
CREATE TABLE "zero_0/cvr".rows (
    "clientGroupID" text NOT NULL,
    schema text NOT NULL,
    "table" text NOT NULL,
    "rowKey" jsonb NOT NULL,
    "rowVersion" text NOT NULL,
    "patchVersion" text NOT NULL,
    "refCounts" jsonb
);
CREATE TABLE "zero_0/cvr"."rowsVersion" (
    "clientGroupID" text NOT NULL,
    version text NOT NULL
);
CREATE TABLE "zero_0/cvr"."versionHistory" (
    "dataVersion" integer NOT NULL,
    "schemaVersion" integer NOT NULL,
    "minSafeVersion" integer NOT NULL,
    lock character(1) DEFAULT 'v'::bpchar NOT NULL,
    CONSTRAINT ck_schema_meta_lock CHECK ((lock = 'v'::bpchar))
);
ALTER TABLE ONLY "zero_0/cvr".clients
    ADD CONSTRAINT clients_pkey PRIMARY KEY ("clientGroupID", "clientID");
ALTER TABLE ONLY "zero_0/cvr".desires
    ADD CONSTRAINT desires_pkey PRIMARY KEY ("clientGroupID", "clientID", "queryHash");
ALTER TABLE ONLY "zero_0/cvr".instances
    ADD CONSTRAINT instances_pkey PRIMARY KEY ("clientGroupID");
ALTER TABLE ONLY "zero_0/cvr"."versionHistory"
    ADD CONSTRAINT pk_schema_meta_lock PRIMARY KEY (lock);
ALTER TABLE ONLY "zero_0/cvr".queries
    ADD CONSTRAINT queries_pkey PRIMARY KEY ("clientGroupID", "queryHash");
ALTER TABLE ONLY "zero_0/cvr"."rowsVersion"
    ADD CONSTRAINT "rowsVersion_pkey" PRIMARY KEY ("clientGroupID");
ALTER TABLE ONLY "zero_0/cvr".rows
    ADD CONSTRAINT rows_pkey PRIMARY KEY ("clientGroupID", schema, "table", "rowKey");
CREATE INDEX desires_inactivated_at ON "zero_0/cvr".desires USING btree ("inactivatedAt");
CREATE INDEX desires_patch_version ON "zero_0/cvr".desires USING btree ("patchVersion");
CREATE INDEX instances_last_active ON "zero_0/cvr".instances USING btree ("lastActive") WHERE (NOT deleted);
CREATE INDEX profile_ids_last_active ON "zero_0/cvr".instances USING btree ("lastActive", "profileID") WHERE ("profileID" IS NOT NULL);
CREATE INDEX queries_patch_version ON "zero_0/cvr".queries USING btree ("patchVersion" NULLS FIRST);
CREATE INDEX row_patch_version ON "zero_0/cvr".rows USING btree ("patchVersion");
CREATE INDEX row_ref_counts ON "zero_0/cvr".rows USING gin ("refCounts");
CREATE INDEX tombstones_last_active ON "zero_0/cvr".instances USING btree ("lastActive") WHERE deleted;
ALTER TABLE ONLY "zero_0/cvr".clients
    ADD CONSTRAINT fk_clients_client_group FOREIGN KEY ("clientGroupID") REFERENCES "zero_0/cvr".instances("clientGroupID") ON DELETE CASCADE;
ALTER TABLE ONLY "zero_0/cvr".desires
    ADD CONSTRAINT fk_desires_query FOREIGN KEY ("clientGroupID", "queryHash") REFERENCES "zero_0/cvr".queries("clientGroupID", "queryHash") ON DELETE CASCADE;
ALTER TABLE ONLY "zero_0/cvr".queries
    ADD CONSTRAINT fk_queries_client_group FOREIGN KEY ("clientGroupID") REFERENCES "zero_0/cvr".instances("clientGroupID") ON DELETE CASCADE;
ALTER TABLE ONLY "zero_0/cvr".rows
    ADD CONSTRAINT fk_rows_client_group FOREIGN KEY ("clientGroupID") REFERENCES "zero_0/cvr"."rowsVersion"("clientGroupID") ON DELETE CASCADE;
