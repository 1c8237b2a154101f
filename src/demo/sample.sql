-- The demo's data: an issue tracker of about 100,000 rows. Deterministic, made by Postgres.
CREATE TABLE "user" (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  color TEXT NOT NULL
);
CREATE TABLE issue (
  id TEXT PRIMARY KEY,
  title TEXT NOT NULL,
  status TEXT NOT NULL,
  priority INT NOT NULL,
  owner_id TEXT NOT NULL REFERENCES "user",
  created_at TIMESTAMPTZ NOT NULL,
  updated_at TIMESTAMPTZ NOT NULL
);
CREATE TABLE comment (
  id TEXT PRIMARY KEY,
  issue_id TEXT NOT NULL REFERENCES issue ON DELETE CASCADE,
  author_id TEXT NOT NULL REFERENCES "user",
  body TEXT NOT NULL,
  created_at TIMESTAMPTZ NOT NULL
);
CREATE TABLE label (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  color TEXT NOT NULL
);
CREATE TABLE issue_label (
  issue_id TEXT NOT NULL REFERENCES issue ON DELETE CASCADE,
  label_id TEXT NOT NULL REFERENCES label,
  PRIMARY KEY (issue_id, label_id)
);

INSERT INTO "user"
SELECT 'u' || g,
       (ARRAY['Ada','Grace','Alan','Edsger','Barbara','Donald','Margaret','Dennis','Radia','Ken',
              'Frances','Tony','Leslie','John','Hedy','Niklaus','Sophie','Linus','Adele','Bjarne'])
         [1 + (g - 1) % 20] || ' ' ||
       (ARRAY['Hill','Stone','Rivers','Marsh','Field'])[1 + (g - 1) / 20],
       'hsl(' || (g * 47) % 360 || ' 60% 45%)'
FROM generate_series(1, 100) g;

INSERT INTO label
SELECT 'l' || n, name, 'hsl(' || (n * 61) % 360 || ' 55% 45%)'
FROM unnest(ARRAY['bug','feature','performance','security','docs','design','regression','mobile',
                  'sync','flaky test','good first issue','needs repro']) WITH ORDINALITY AS l (name, n);

INSERT INTO issue
SELECT 'i' || g,
       (ARRAY['Crash','Slow response','Wrong colour','Timeout','Typo','Memory growth','Lost update',
              'Flicker','Missing icon','Duplicate row'])[1 + g * 7 % 10] || ' ' ||
       (ARRAY['when opening','after closing','while saving','on first load of','in dark mode of',
              'when offline in','after an upgrade of','with two tabs of'])[1 + g * 11 % 8] || ' ' ||
       (ARRAY['the editor','the inbox','a large project','the settings','search','the calendar',
              'the export dialog','a shared board','the sidebar'])[1 + g * 13 % 9],
       (ARRAY['open','open','in progress','review','closed','closed','closed'])[1 + g * 17 % 7],
       1 + g * 19 % 4,
       'u' || 1 + g * 23 % 100,
       now() - (20001 - g) * interval '5 minutes',
       now() - (20001 - g) * interval '5 minutes'
FROM generate_series(1, 20000) g;

INSERT INTO comment
SELECT 'c' || g,
       'i' || 1 + g::bigint * 7919 % 20000,
       'u' || 1 + g * 29 % 100,
       (ARRAY['I can reproduce this.','Fixed on main.','Could you attach a trace?',
              'Same here since yesterday.','Not a bug: see the manual.','Bisected to last week.',
              'Raising the priority.','Works after a restart.'])[1 + g * 31 % 8],
       now() - (55001 - g) * interval '2 minutes'
FROM generate_series(1, 55000) g;

INSERT INTO issue_label
SELECT DISTINCT 'i' || 1 + g::bigint * 104729 % 20000, 'l' || 1 + g * 37 % 12
FROM generate_series(1, 26000) g;

CREATE INDEX ON comment (issue_id);
CREATE INDEX ON issue (owner_id);
CREATE INDEX ON issue (status, updated_at);
CREATE INDEX ON issue_label (label_id);
ANALYZE;

-- Everybody may read everything (what `zero-deploy-permissions` would write).
CREATE SCHEMA IF NOT EXISTS zero;
CREATE TABLE IF NOT EXISTS zero.permissions (
  permissions JSONB,
  hash TEXT,
  lock BOOL PRIMARY KEY DEFAULT true CHECK (lock)
);
INSERT INTO zero.permissions (permissions, hash)
SELECT p, md5(p::text)
FROM (SELECT jsonb_build_object('tables', jsonb_object_agg(t, '{"row":{"select":[["allow",{"type":"and","conditions":[]}]]}}'::jsonb)) AS p
      FROM unnest(ARRAY['user','issue','comment','label','issue_label']) t) r;
