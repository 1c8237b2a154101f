-- Everything of the schema NAME that a dump would show, from the catalogs.
SELECT line FROM (
  SELECT c.relname || '.' || row_number() OVER (PARTITION BY c.oid ORDER BY a.attnum) || ' '
    || a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull
    || ' ' || coalesce(pg_get_expr(d.adbin, d.adrelid), '-') AS line
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
  WHERE c.relnamespace = 'NAME'::regnamespace AND c.relkind = 'r' AND a.attnum > 0
    AND NOT a.attisdropped
  UNION ALL
  SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
  FROM pg_constraint WHERE connamespace = 'NAME'::regnamespace
  UNION ALL
  SELECT pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
  WHERE c.relnamespace = 'NAME'::regnamespace
) x ORDER BY 1
