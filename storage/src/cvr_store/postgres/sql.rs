//! The statements. `@.` stands for the schema.
//!
//! A flush is one transaction in one round trip. Its first statement ([`Sql::gate`]) locks and
//! checks the groups and leaves the ids of those that may write in a setting of the transaction,
//! `zeroring.won`; every later statement joins its records to it. So a refused group writes
//! nothing, the others do not notice, and nothing has to be awaited in between.
//!
//! Keys of rows come out of subqueries that are not merged into their statement (`OFFSET 0`), so
//! that no part of them is a constant that tempts Postgres to read more than the wanted rows.
//!
//! Locks are taken in one order: groups by id, then their `rowsVersion`, then rows (which are
//! sorted within a group). A batch never waits for a group's lock: it skips what is locked.

use super::schema::qualify;

macro_rules! statements {
    ($($(#[$doc:meta])* $name:ident = $text:expr;)*) => {
        /// The statements of one schema.
        #[derive(Debug)]
        pub(super) struct Sql { $($(#[$doc])* pub(super) $name: String,)* }

        impl Sql {
            pub(super) fn new(schema: &str) -> Sql {
                let mut sql = Sql { $($name: qualify($text, schema),)* };
                sql.gate_skip = sql.gate.replace(LOCKING, "SKIP LOCKED");
                sql
            }
        }
    };
}

/// Where [`Sql::gate_skip`] leaves out the groups that are locked elsewhere.
const LOCKING: &str = "/*locking*/";

statements! {
    /// Limits of a transaction that was begun: idle time ($1), lock time ($2). And its plans:
    /// everything is found by primary key, record by record. Postgres, which may know nothing yet
    /// about tables that have just grown, would rather read them as a whole. So a plan does for all
    /// parameters, and is made once per connection: making it takes longer than a small flush.
    limits = "SELECT set_config('statement_timeout', '0', true),
        set_config('idle_in_transaction_session_timeout', $1::text, true),
        set_config('lock_timeout', $2::text, true), set_config('enable_seqscan', 'off', true),
        set_config('enable_mergejoin', 'off', true), set_config('jit', 'off', true),
        set_config('plan_cache_mode', 'force_generic_plan', true)";

    /// Stubs of groups ($1) that are flushed for the first time, so that two first flushes meet at
    /// the primary key. Those that are ours to take back are noted.
    stubs = r#"WITH made AS (
        INSERT INTO @."instances" ("clientGroupID", "version", "lastActive")
        SELECT id, '00', to_timestamp(0) FROM unnest($1::text[]) AS x (id) ORDER BY id
        ON CONFLICT DO NOTHING RETURNING "clientGroupID" AS id)
      SELECT set_config('zeroring.made', coalesce(array_agg(id), '{}')::text, true) FROM made"#;

    /// Locks and checks groups. $1 our task id; per group $2 id, $3 expected and $4 new version,
    /// $5 connection, $6 last activity, $7 clock, $8 profile, $9 whether the rows must be of the
    /// expected version (not if more of them follow others that we owe); then pairs of group and
    /// what it needs: $10/$11 queries that must exist, $12/$13 clients that must not; $14 earlier
    /// attempts may have committed.
    gate = r#"WITH g AS MATERIALIZED (
        SELECT id, expected, version, to_timestamp(connect / 1000) AS connect,
          to_timestamp(active / 1000) AS active, clock, profile, rows_too, n
        FROM unnest($2::text[], $3::text[], $4::text[], $5::float8[], $6::float8[], $7::float8[],
            $8::text[], $9::bool[]) WITH ORDINALITY
          AS x (id, expected, version, connect, active, clock, profile, rows_too, n)
      ), cur AS MATERIALIZED (
        SELECT i."clientGroupID" AS id, i."version", i."owner", i."grantedAt", i."deleted",
          i."lastActive", i."ttlClock", i."profileID"
        FROM @."instances" i WHERE i."clientGroupID" = ANY ($2::text[])
        ORDER BY i."clientGroupID" FOR UPDATE OF i /*locking*/
      ), lacks AS (
        SELECT x.id, min(x.hash) AS hash FROM unnest($10::text[], $11::text[]) AS x (id, hash)
        WHERE NOT EXISTS (SELECT FROM @."queries" q
          WHERE q."clientGroupID" = x.id AND q."queryHash" = x.hash)
        GROUP BY x.id
      ), there AS (
        SELECT x.id, min(x.client) AS client FROM unnest($12::text[], $13::text[]) AS x (id, client)
        WHERE EXISTS (SELECT FROM @."clients" c
          WHERE c."clientGroupID" = x.id AND c."clientID" = x.client)
        GROUP BY x.id
      ), seen AS MATERIALIZED (
        SELECT g.n, g.id, cur.id IS NOT NULL AS locked, cur."version", cur."owner", cur."deleted",
          (extract(epoch FROM cur."grantedAt") * 1000)::float8 AS granted,
          coalesce(cur."owner" IS DISTINCT FROM $1::text AND cur."grantedAt" > g.connect, false)
            AS owned_elsewhere,
          $14::bool AND cur."version" <> g.expected AND cur."version" = g.version
            AND cur."owner" = $1::text AND cur."grantedAt" = g.connect
            AND cur."lastActive" = g.active AND cur."ttlClock" = g.clock
            AND cur."profileID" IS NOT DISTINCT FROM g.profile AS done,
          g.expected = cur."version" AND cur."deleted" IS NOT TRUE AS as_expected,
          lacks.hash AS lacks, there.client AS there,
          CASE WHEN g.rows_too THEN (SELECT nullif(coalesce(max(v."version"), '00'), g.expected)
            FROM @."rowsVersion" v WHERE v."clientGroupID" = g.id) END AS rows_at
        FROM g LEFT JOIN cur USING (id) LEFT JOIN lacks USING (id) LEFT JOIN there USING (id)
      ), won AS MATERIALIZED (
        SELECT id FROM seen
        WHERE locked AND as_expected AND NOT owned_elsewhere AND done IS NOT TRUE
          AND lacks IS NULL AND there IS NULL AND rows_at IS NULL
      ), noted AS MATERIALIZED (
        SELECT set_config('zeroring.won', coalesce(array_agg(id), '{}')::text, true) AS won FROM won
      )
      SELECT seen.n, won.id IS NOT NULL AS won, coalesce(seen.done, false) AS done, seen.locked,
        EXISTS (SELECT FROM @."instances" i WHERE i."clientGroupID" = seen.id) AS known,
        seen."version", seen."owner", seen.granted, seen.owned_elsewhere,
        coalesce(seen.as_expected, false) AS as_expected, seen.lacks, seen.there, seen.rows_at,
        noted.won IS NULL
      FROM seen LEFT JOIN won USING (id) CROSS JOIN noted"#;

    /// [`Sql::gate`] without waiting.
    gate_skip = "";

    /// $1 our task id; per group $2 id, $3 version, $4 last activity, $5 clock, $6 replica version,
    /// $7 connection, $8 client schema (NULL leaves it), $9 profile.
    instances = r#"UPDATE @."instances" i SET "version" = x.version,
        "lastActive" = to_timestamp(x.active / 1000), "ttlClock" = x.clock,
        "replicaVersion" = x.replica, "owner" = $1::text,
        "grantedAt" = to_timestamp(x.connect / 1000),
        "clientSchema" = coalesce(x.schema::jsonb, i."clientSchema"), "profileID" = x.profile
      FROM unnest($2::text[], $3::text[], $4::float8[], $5::float8[], $6::text[], $7::float8[],
          $8::text[], $9::text[])
        AS x (id, version, active, clock, replica, connect, schema, profile)
      JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      WHERE i."clientGroupID" = x.id"#;

    /// Writes rows that follow: nothing is asked, the groups $1 may write.
    rows_follow = "SELECT set_config('zeroring.won', $1::text, true)";

    /// Pairs $1 group, $2 client.
    delete_clients = r#"DELETE FROM @."clients" c USING unnest($1::text[], $2::text[]) AS x (id, client)
      JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      WHERE c."clientGroupID" = x.id AND c."clientID" = x.client"#;

    /// Pairs $1 group, $2 client.
    insert_clients = r#"INSERT INTO @."clients" ("clientGroupID", "clientID")
      SELECT x.id, x.client FROM unnest($1::text[], $2::text[]) AS x (id, client)
      JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      ON CONFLICT DO NOTHING"#;

    /// Whole records: $1 group, $2 hash, $3 AST, $4 name, $5 arguments, $6 patch version,
    /// $7 transformation hash, $8 its version, $9 internal, $10 signature.
    queries = r#"INSERT INTO @."queries" ("clientGroupID", "queryHash", "clientAST", "queryName",
        "queryArgs", "patchVersion", "transformationHash", "transformationVersion", "internal",
        "deleted", "rowSetSignature")
      SELECT x.id, x.hash, x.ast::jsonb, x.name, x.args::json, x.patch, x.transformed, x.since,
        x.internal, false, x.signature
      FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
          $8::text[], $9::bool[], $10::text[])
        AS x (id, hash, ast, name, args, patch, transformed, since, internal, signature)
      JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      ON CONFLICT ("clientGroupID", "queryHash") DO UPDATE SET
        "clientAST" = excluded."clientAST", "queryName" = excluded."queryName",
        "queryArgs" = excluded."queryArgs", "patchVersion" = excluded."patchVersion",
        "transformationHash" = excluded."transformationHash",
        "transformationVersion" = excluded."transformationVersion",
        "internal" = excluded."internal", "deleted" = excluded."deleted",
        "rowSetSignature" = excluded."rowSetSignature""#;

    /// Parts of records: $1 group, $2 hash, $3 whether the execution changed, and then $4 deleted,
    /// $5 patch version, $6 transformation hash, $7 its version; $8 signature (NULL leaves it).
    update_queries = r#"UPDATE @."queries" q SET
        "deleted" = CASE WHEN x.changed THEN x.deleted ELSE q."deleted" END,
        "patchVersion" = CASE WHEN x.changed THEN x.patch ELSE q."patchVersion" END,
        "transformationHash" =
          CASE WHEN x.changed THEN x.transformed ELSE q."transformationHash" END,
        "transformationVersion" =
          CASE WHEN x.changed THEN x.since ELSE q."transformationVersion" END,
        "rowSetSignature" = coalesce(x.signature, q."rowSetSignature")
      FROM unnest($1::text[], $2::text[], $3::bool[], $4::bool[], $5::text[], $6::text[], $7::text[],
          $8::text[]) AS x (id, hash, changed, deleted, patch, transformed, since, signature)
      JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      WHERE q."clientGroupID" = x.id AND q."queryHash" = x.hash"#;

    /// $1 group, $2 client, $3 hash, $4 patch version, $5 deleted, $6 TTL, $7 inactivation. The
    /// old columns `ttl` (seconds) and `inactivatedAt` (divided by 1000 twice, as the original
    /// does) are written and never read.
    desires = r#"INSERT INTO @."desires" ("clientGroupID", "clientID", "queryHash", "patchVersion",
        "deleted", "ttl", "ttlMs", "inactivatedAt", "inactivatedAtMs")
      SELECT x.id, x.client, x.hash, x.patch, x.deleted, make_interval(secs => x.ttl / 1000), x.ttl,
        to_timestamp(x.inactivated / 1000 / 1000), x.inactivated
      FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bool[], $6::float8[],
          $7::float8[]) AS x (id, client, hash, patch, deleted, ttl, inactivated)
      JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      ON CONFLICT ("clientGroupID", "clientID", "queryHash") DO UPDATE SET
        "patchVersion" = excluded."patchVersion", "deleted" = excluded."deleted",
        "ttl" = excluded."ttl", "ttlMs" = excluded."ttlMs",
        "inactivatedAt" = excluded."inactivatedAt", "inactivatedAtMs" = excluded."inactivatedAtMs""#;

    /// The version that the rows are of, even if none is written: $1 group, $2 version.
    rows_version = r#"INSERT INTO @."rowsVersion" ("clientGroupID", "version")
      SELECT x.id, x.version FROM unnest($1::text[], $2::text[]) AS x (id, version)
      JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      ORDER BY x.id
      ON CONFLICT ("clientGroupID") DO UPDATE SET "version" = excluded."version""#;

    /// $1 group, $2 table, $3 key.
    delete_rows = r#"DELETE FROM @."rows" r
      USING (SELECT id, '' AS s, t, k::jsonb AS k FROM unnest($1::text[], $2::text[], $3::text[])
        AS x (id, t, k) OFFSET 0) AS x
      JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      WHERE r."clientGroupID" = x.id AND r."schema" = x.s AND r."table" = x.t
        AND r."rowKey" = x.k"#;

    /// $1 group, $2 table, $3 key, $4 row version, $5 patch version, $6 references.
    put_rows = r#"INSERT INTO @."rows" ("clientGroupID", "schema", "table", "rowKey", "rowVersion",
        "patchVersion", "refCounts")
      SELECT x.id, '', x.t, x.k::jsonb, x.version, x.patch, x.refs::jsonb
      FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
        AS x (id, t, k, version, patch, refs)
      JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      ON CONFLICT ("clientGroupID", "schema", "table", "rowKey") DO UPDATE SET
        "rowVersion" = excluded."rowVersion", "patchVersion" = excluded."patchVersion",
        "refCounts" = excluded."refCounts""#;

    /// $1 group, $2 table, $3 key, $4 row version (NULL leaves it), $5 patch version. Answers how
    /// many live records there were per group.
    bury_rows = r#"WITH found AS (
        UPDATE @."rows" r SET "rowVersion" = coalesce(x.version, r."rowVersion"),
          "patchVersion" = x.patch, "refCounts" = NULL
        FROM (SELECT id, '' AS s, t, k::jsonb AS k, version, patch
          FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])
            AS x (id, t, k, version, patch) OFFSET 0) AS x
        JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
        WHERE r."clientGroupID" = x.id AND r."schema" = x.s AND r."table" = x.t
          AND r."rowKey" = x.k AND r."refCounts" IS NOT NULL
        RETURNING x.id)
      SELECT id, count(*) FROM found GROUP BY id"#;

    /// Changes live records that were not read: $1 group, $2 table, $3 key, $4 row version (NULL
    /// leaves it), $5 patch version, $6 keep the stored one if the row version is the same,
    /// $7 references that go (array), $8 references that are set (JSON). Without a live record,
    /// one is made of what is known. Answers how many live records there were per group.
    adjust_rows = r#"WITH x AS MATERIALIZED (
        SELECT x.id, '' AS s, x.t, x.k::jsonb AS k, x.version, x.patch, x.keep, x.gone::text[] AS gone,
          x.refs::jsonb AS refs, n
        FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bool[],
            $7::text[], $8::text[]) WITH ORDINALITY
          AS x (id, t, k, version, patch, keep, gone, refs, n)
        JOIN unnest(current_setting('zeroring.won')::text[]) AS won (id) USING (id)
      ), found AS (
        UPDATE @."rows" r SET "rowVersion" = coalesce(x.version, r."rowVersion"),
          "patchVersion" =
            CASE WHEN x.keep AND x.version = r."rowVersion" THEN r."patchVersion" ELSE x.patch END,
          "refCounts" = nullif((r."refCounts" - x.gone) || x.refs, '{}'::jsonb)
        FROM x WHERE r."clientGroupID" = x.id AND r."schema" = x.s AND r."table" = x.t
          AND r."rowKey" = x.k AND r."refCounts" IS NOT NULL
        RETURNING x.id, x.n
      ), made AS (
        INSERT INTO @."rows" ("clientGroupID", "schema", "table", "rowKey", "rowVersion",
          "patchVersion", "refCounts")
        SELECT x.id, '', x.t, x.k, x.version, x.patch, nullif(x.refs, '{}'::jsonb) FROM x
        WHERE x.version IS NOT NULL AND x.n NOT IN (SELECT n FROM found)
        ON CONFLICT ("clientGroupID", "schema", "table", "rowKey") DO UPDATE SET
          "rowVersion" = excluded."rowVersion", "patchVersion" = excluded."patchVersion",
          "refCounts" = excluded."refCounts")
      SELECT id, count(*) FROM found GROUP BY id"#;

    /// Takes stubs back whose groups did not come to write.
    drop_stubs = r#"DELETE FROM @."instances"
      WHERE "clientGroupID" IN (
        SELECT unnest(current_setting('zeroring.made')::text[])
        EXCEPT SELECT unnest(current_setting('zeroring.won')::text[]))"#;

    /// $1 group, $2 clock, $3 last activity. A group whose flush is under way is left to it.
    ttl_clocks = r#"UPDATE @."instances" i SET "lastActive" = to_timestamp(x.active / 1000),
        "ttlClock" = x.clock
      FROM (SELECT "clientGroupID" AS id, y.clock, y.active FROM @."instances"
        JOIN unnest($1::text[], $2::float8[], $3::float8[]) AS y (id, clock, active)
          ON y.id = "clientGroupID"
        ORDER BY "clientGroupID" FOR UPDATE OF "instances" SKIP LOCKED) x
      WHERE i."clientGroupID" = x.id"#;

    /// Notes take-overs: $1 our task id, $2 groups, $3 connections.
    claim = r#"UPDATE @."instances" i SET "owner" = $1::text, "grantedAt" = x.connect
      FROM (SELECT "clientGroupID" AS id, to_timestamp(y.connect / 1000) AS connect
        FROM @."instances" JOIN unnest($2::text[], $3::float8[]) AS y (id, connect)
          ON y.id = "clientGroupID"
        ORDER BY "clientGroupID" FOR UPDATE OF "instances") x
      WHERE i."clientGroupID" = x.id AND i."owner" IS DISTINCT FROM $1::text
        AND i."deleted" IS NOT TRUE AND (i."grantedAt" IS NULL OR i."grantedAt" <= x.connect)"#;

    /// Groups $1.
    load_instances = r#"SELECT i."clientGroupID", i."version",
        (extract(epoch FROM i."lastActive") * 1000)::float8, i."ttlClock", i."replicaVersion",
        i."owner", (extract(epoch FROM i."grantedAt") * 1000)::float8, i."clientSchema"::text,
        i."profileID", coalesce(i."deleted", false), coalesce(v."version", '00')
      FROM @."instances" i LEFT JOIN @."rowsVersion" v USING ("clientGroupID")
      WHERE i."clientGroupID" = ANY ($1::text[])"#;

    /// Groups $1.
    load_clients = r#"SELECT "clientGroupID", "clientID" FROM @."clients"
      WHERE "clientGroupID" = ANY ($1::text[])"#;

    /// Groups $1; $2 deleted ones too.
    load_queries = r#"SELECT "clientGroupID", "queryHash", "clientAST"::text, "queryName",
        "queryArgs"::text, "patchVersion", "transformationHash", "transformationVersion",
        coalesce("internal", false), "rowSetSignature"
      FROM @."queries"
      WHERE "clientGroupID" = ANY ($1::text[]) AND ($2::bool OR "deleted" IS DISTINCT FROM true)"#;

    /// Groups $1.
    load_desires = r#"SELECT "clientGroupID", "clientID", "queryHash", "patchVersion",
        coalesce("deleted", false), "ttlMs", "inactivatedAtMs"
      FROM @."desires" WHERE "clientGroupID" = ANY ($1::text[])"#;

    /// Version of group $1, and of its rows.
    versions = r#"SELECT i."version", coalesce(v."version", '00') FROM @."instances" i
      LEFT JOIN @."rowsVersion" v USING ("clientGroupID") WHERE i."clientGroupID" = $1::text"#;

    /// Live rows of group $1 that mention one of the queries $2, after table $3 and key $4, at most
    /// $5, in key order. (`IS TRUE` keeps the index on
    /// references out of it, which knows nothing of groups: popular queries are in all of them.)
    rows_of_queries = r#"SELECT "table", "rowKey"::text AS k, "rowVersion", "patchVersion",
        "refCounts"::text
      FROM @."rows" WHERE "clientGroupID" = $1::text AND "schema" = ''
        AND ("refCounts" ?| $2::text[]) IS TRUE
        AND ($3::text IS NULL OR ("table", "rowKey") > ($3::text, $4::text::jsonb))
      ORDER BY "table", "rowKey" LIMIT $5::int8"#;

    /// Live rows of group $1 with tables $2 and keys $3.
    rows_by_key = r#"SELECT r."table", r."rowKey"::text, r."rowVersion", r."patchVersion",
        r."refCounts"::text
      FROM (SELECT $1::text AS id, '' AS s, t, k::jsonb AS k
        FROM unnest($2::text[], $3::text[]) AS x (t, k) OFFSET 0) AS x
      JOIN @."rows" r ON r."clientGroupID" = x.id AND r."schema" = x.s AND r."table" = x.t
        AND r."rowKey" = x.k
      WHERE r."refCounts" IS NOT NULL"#;

    /// Rows of group $1 with patch versions from $2 on (as bytes), without those that mention a
    /// query of $3, after table $4 and key $5, at most $6, in key order.
    catchup_rows = r#"SELECT "table", "rowKey"::text AS k, "rowVersion", "patchVersion",
        "refCounts"::text
      FROM @."rows" WHERE "clientGroupID" = $1::text AND "schema" = ''
        AND "patchVersion" COLLATE "C" >= $2::text
        AND ("refCounts" ?| $3::text[]) IS NOT TRUE
        AND ($4::text IS NULL OR ("table", "rowKey") > ($4::text, $5::text::jsonb))
      ORDER BY "table", "rowKey" LIMIT $6::int8"#;

    /// Queries of group $1 that have entered or left the got set since $2 (as bytes).
    catchup_queries = r#"SELECT "queryHash", "patchVersion", coalesce("deleted", false)
      FROM @."queries" WHERE "clientGroupID" = $1::text AND "patchVersion" COLLATE "C" >= $2::text"#;

    /// Desires of group $1 that changed since $2 (as bytes).
    catchup_desires = r#"SELECT "clientID", "queryHash", "patchVersion", coalesce("deleted", false)
      FROM @."desires" WHERE "clientGroupID" = $1::text AND "patchVersion" COLLATE "C" >= $2::text"#;

    /// Rows per query of group $1.
    rows_per_query = r#"SELECT k.hash, count(*) FROM @."rows" r,
        jsonb_object_keys(r."refCounts") AS k (hash)
      WHERE r."clientGroupID" = $1::text AND r."refCounts" IS NOT NULL GROUP BY k.hash"#;

    /// Groups to purge: not active since $1, at most $2. Answers how many; their ids are noted.
    purge_find = r#"WITH found AS (
        SELECT "clientGroupID" AS id FROM @."instances"
        WHERE NOT "deleted" AND "lastActive" < to_timestamp($1::float8 / 1000)
        ORDER BY "lastActive" LIMIT $2::int8 FOR UPDATE SKIP LOCKED)
      SELECT count(*), set_config('zeroring.purged', coalesce(array_agg(id), '{}')::text, true)
      FROM found"#;

    /// What is left of them.
    purge_bury = r#"UPDATE @."instances" SET "deleted" = TRUE, "version" = '00', "ttlClock" = 0,
        "replicaVersion" = NULL, "owner" = NULL, "grantedAt" = NULL, "clientSchema" = NULL
      WHERE "clientGroupID" IN (SELECT unnest(current_setting('zeroring.purged')::text[]))"#;

    /// Tombstones not active since $1 are forgotten.
    purge_forget = r#"DELETE FROM @."instances"
      WHERE "deleted" AND "lastActive" < to_timestamp($1::float8 / 1000)"#;

    /// Groups that are still to be purged.
    purge_rest = r#"SELECT count(*) FROM @."instances"
      WHERE NOT "deleted" AND "lastActive" < to_timestamp($1::float8 / 1000)"#;
}

/// Removes what the groups noted by [`Sql::purge_find`] have in one of their tables.
pub(super) fn purge_delete(table: &str, schema: &str) -> String {
    qualify(
        &format!(
            r#"DELETE FROM @."{table}"
               WHERE "clientGroupID" IN (SELECT unnest(current_setting('zeroring.purged')::text[]))"#
        ),
        schema,
    )
}
