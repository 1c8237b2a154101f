CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE DOMAIN posint AS int CHECK (VALUE > 0);
CREATE TABLE issue (
  id varchar(180) PRIMARY KEY,
  n int8 DEFAULT 5,
  price numeric(10,2),
  tags text[] DEFAULT '{}',
  m mood NOT NULL,
  ms mood[],
  b bit(3),
  vs varchar(10)[],
  gen int GENERATED ALWAYS AS (length(id)) STORED,
  created timestamptz NOT NULL DEFAULT now(),
  d posint,
  p point,
  serial serial,
  grid int[][],
  "Mixed-Case.x" text,
  UNIQUE (n, price)
);
CREATE TABLE nopk (a int NOT NULL, b text NOT NULL, c text, UNIQUE (a, b));
CREATE INDEX ON issue (n DESC, id ASC) INCLUDE (price);
CREATE INDEX ON issue (n) WHERE n > 5;
CREATE INDEX ON issue (lower(id));
CREATE INDEX ON issue (gen);
CREATE TABLE ctas AS SELECT 1 AS id, ARRAY[1] AS a;
CREATE TABLE excluded (id int PRIMARY KEY, r int4range, EXCLUDE USING gist (r WITH &&));
CREATE TABLE renamed (id int PRIMARY KEY, old int UNIQUE DEFERRABLE INITIALLY DEFERRED, gone int);
ALTER TABLE renamed RENAME old TO new;
ALTER TABLE renamed DROP gone;
CREATE TABLE "Part-ed" (id int, k int, PRIMARY KEY (id, k)) PARTITION BY RANGE (k);
CREATE TABLE part_1 PARTITION OF "Part-ed" FOR VALUES FROM (0) TO (10);
CREATE TABLE kid (id int PRIMARY KEY, p int REFERENCES renamed (id));
CREATE TABLE full_id (x int, y text);
ALTER TABLE full_id REPLICA IDENTITY FULL;
CREATE SCHEMA elsewhere;
CREATE TABLE elsewhere.x (id int PRIMARY KEY);
