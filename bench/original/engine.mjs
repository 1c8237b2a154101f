// The original's engine alone, on the data and the queries of `zeroring-bench`: started by
// `zeroring-bench --compare`, see ../src/compare.rs.
//
//   node engine.mjs NODE_MODULES DATA_DIR [FILTER]
//
// Prints a line of JSON per bench: {"name", "unit", "wall_ns": [per round], "cpu_ns": [per round]},
// per unit of work; cpu_ns is of the thread that does the work (no collector or compiler threads).
//
// Two engines of the published package are driven, both without anything around them (no sockets,
// no client view records, no snapshots, no change log: the changes are handed over ready-made):
//
// - `sqlite/…`: what its server runs per client group: `PipelineDriver` over SQLite, with its
//   planner, its operator storage in SQLite, row signatures and row keys. It never runs out of
//   time: timers that stand still, so that neither a yield nor a reset of pipelines happens.
// - `memory/…`: the same operators over its in-memory source (what its client runs).
//
// Everything favours it where there is a choice: code is warmed up, nothing is logged.

import {copyFileSync, mkdtempSync, readFileSync, rmSync} from 'node:fs';
import {createRequire} from 'node:module';
import {tmpdir} from 'node:os';
import {join, resolve} from 'node:path';
import {pathToFileURL} from 'node:url';

const [modules, data, filter = ''] = process.argv.slice(2);
if (!data) {
  console.error('usage: node engine.mjs NODE_MODULES DATA_DIR [FILTER]');
  process.exit(2);
}
const zero = resolve(modules, '@rocicorp/zero');
const load = path => import(pathToFileURL(join(zero, 'out', path)).href);
const {PipelineDriver} = await load('zero-cache/src/services/view-syncer/pipeline-driver.js');
const {Snapshotter} = await load('zero-cache/src/services/view-syncer/snapshotter.js');
const {DatabaseStorage} = await load('zqlite/src/database-storage.js');
const {Database} = await load('zqlite/src/db.js');
const {buildPipeline} = await load('zql/src/builder/builder.js');
const {MemorySource} = await load('zql/src/ivm/memory-source.js');
const {MemoryStorage} = await load('zql/src/ivm/memory-storage.js');
const logger = createRequire(join(zero, 'package.json')).resolve('@rocicorp/logger');
const {LogContext} = await import(pathToFileURL(logger).href);

const lc = new LogContext('error', {}, {log() {}});
const shard = {appID: 'zero', shardNum: 0};
const logConfig = {ivmSampling: 5000, slowRowThreshold: 2, slowHydrateThreshold: 100};
const stopped = {totalElapsed: () => 0, elapsedLap: () => 0};
const scratch = mkdtempSync(join(tmpdir(), 'zeroring-bench-original-'));
process.on('exit', () => rmSync(scratch, {recursive: true, force: true}));

// --- The two engines. Both: addQuery(ast) and advance(changes), which return how many rows they
// emitted. A change is {table, old?, new?}.

const types = {string: ['id', 'project_id', 'project', 'item', 'org', 'title', 'body'],
  number: ['rank', 'created'], boolean: ['open']};
const typeOf = column => Object.keys(types).find(t => types[t].includes(column));
const itemColumns = ['id', 'project_id', 'rank', 'title', 'body'];

function clientSchema(tables) {
  const of = columns => Object.fromEntries(columns.map(c => [c, {type: typeOf(c)}]));
  const table = columns => ({columns: of(columns), primaryKey: ['id']});
  return {tables: Object.fromEntries(Object.entries(tables).map(([n, c]) => [n, table(c)]))};
}

// The server's snapshots, but for what changed: that is handed over instead of read.
class Handed {
  constructor(file) {
    this.real = new Snapshotter(lc, file, shard);
  }
  changes = [];
  init() {
    this.real.init();
  }
  initialized() {
    return this.real.initialized();
  }
  current() {
    return this.real.current();
  }
  destroy() {
    this.real.destroy();
  }
  advance() {
    const now = this.real.current();
    const diff = this.changes.map(c => ({
      table: c.table,
      prevValues: c.old ? [c.old] : [],
      nextValue: c.new ?? null,
    }));
    return {prev: now, curr: now, changes: diff.length, [Symbol.iterator]: () => diff.values()};
  }
}

let storages = 0;

class Server {
  constructor(file, schema) {
    this.snapshots = new Handed(file);
    this.storage = DatabaseStorage.create(lc, join(scratch, `storage-${storages++}`));
    this.driver = new PipelineDriver(lc, logConfig, this.snapshots, shard,
      this.storage.createClientGroupStorage('bench'), 'bench', {addMetric() {}}, () => 10, true, {});
    this.driver.init(schema);
    this.queries = 0;
  }
  addQuery(ast) {
    const id = `q${this.queries++}`;
    let rows = 0;
    for (const change of this.driver.addQuery(id, id, ast, stopped)) if (change !== 'yield') rows++;
    return rows;
  }
  removeQueries() {
    for (const id of [...this.driver.queries().keys()]) this.driver.removeQuery(id);
  }
  advance(changes) {
    this.snapshots.changes = changes;
    let rows = 0;
    for (const c of this.driver.advance(stopped).changes) if (c !== 'yield') rows++;
    return rows;
  }
  close() {
    this.driver.destroy();
    this.storage.close();
  }
}

// Rows of a change, with those of its relationships.
function emitted(change) {
  if (change === 'yield') return 0;
  const nodes = list => {
    let rows = 0;
    for (const node of list) {
      if (node === 'yield') continue;
      rows++;
      for (const children of Object.values(node.relationships)) rows += nodes(children());
    }
    return rows;
  };
  const [kind, node, third] = change;
  if (kind === 3) return emitted(third.change);
  return kind === 2 ? 1 : nodes([node]);
}

class Memory {
  constructor(tables) {
    this.sources = new Map(Object.entries(tables).map(([name, {columns, rows}]) => {
      const specs = Object.fromEntries([...columns, '_0_version'].map(c =>
        [c, {type: c === '_0_version' ? 'string' : typeOf(c)}]));
      const source = new MemorySource(name, specs, ['id']);
      for (const row of rows) for (const _ of source.genPush([0, row])) { /* it is written */ }
      return [name, source];
    }));
    this.rows = 0;
    this.queries = 0;
  }
  addQuery(ast) {
    const same = input => input;
    const input = buildPipeline(ast, {
      enableNotExists: true,
      getSource: name => this.sources.get(name),
      createStorage: () => new MemoryStorage(),
      decorateSourceInput: same, decorateInput: same, decorateFilterInput: same, addEdge() {},
    }, `q${this.queries++}`);
    input.setOutput({push: change => {
      this.rows += emitted(change);
      return [];
    }});
    let rows = 0;
    for (const node of input.fetch({})) if (node !== 'yield') rows += emitted([0, node]);
    return rows;
  }
  advance(changes) {
    this.rows = 0;
    for (const c of changes) {
      const change = !c.old ? [0, c.new] : !c.new ? [1, c.old] : [2, c.new, c.old];
      for (const _ of this.sources.get(c.table).genPush(change)) { /* counted by the output */ }
    }
    return this.rows;
  }
  close() {}
}

// --- Data and queries: those of ../src/{fixture,engine,hydrate}.rs.

const ITEMS = 50;
const version = n => `4${n.toString(36).padStart(8, '0')}`;
const row = (n, rank, at = 0) => ({
  id: `item-${n}`,
  project_id: `p${Math.floor(n / ITEMS)}`,
  rank,
  title: `Item "${n}" of a project`,
  body: 'some text of an item, as long as such texts are on the average of them',
  _0_version: version(at),
});
const simple = (column, op, value) =>
  ({type: 'simple', op, left: {type: 'column', name: column}, right: {type: 'literal', value}});
const byId = [['id', 'asc']];
const ofProject = p => ({table: 'item', orderBy: byId, where: simple('project_id', '=', `p${p}`)});

// A copy of a file of the data, in the mode that its server wants.
let copies = 0;
function copy(name, prepare = '') {
  const file = join(scratch, `${copies++}-${name}`);
  copyFileSync(join(data, name), file);
  const db = new Database(lc, file);
  if (prepare) db.exec(prepare);
  // SQLite does not go from wal to wal2 at once.
  db.pragma('journal_mode = delete');
  db.pragma('journal_mode = wal2');
  db.close();
  return file;
}

function items(kind, rows) {
  if (kind === 'memory') {
    const all = Array.from({length: rows}, (_, n) => row(n, n));
    return new Memory({item: {columns: itemColumns, rows: all}});
  }
  const file = copy('items.db', `DELETE FROM item WHERE rank >= ${rows}; ANALYZE`);
  return new Server(file, clientSchema({item: itemColumns}));
}

// Commits that give items other ranks and then take it all back, as in ../src/engine.rs.
function cycle(writes) {
  const now = new Map();
  const there = writes.map((commit, at) => commit.map(([n, rank]) => {
    const old = now.get(n) ?? row(n, n);
    const next = row(n, rank, at + 1);
    now.set(n, next);
    return {table: 'item', old, new: next};
  }));
  const back = there.toReversed().map(commit =>
    commit.map(c => ({table: c.table, old: c.new, new: c.old})).toReversed());
  return [...there, ...back];
}

function replay(engine, commits, batch) {
  let at = 0;
  let reached = 0;
  const run = () => {
    for (let i = 0; i < batch; i++) reached += engine.advance(commits[at++ % commits.length]);
    if (at >= commits.length && reached === 0) throw new Error('commits that reach no query');
    return batch;
  };
  return {run, close: () => engine.close()};
}

const singles = (count, rows) => Array.from({length: count}, (_, i) =>
  [[((i + 1) * 61) % rows, ((i + 1) * 7919) % 100_000]]);

function route(kind, queries) {
  const engine = items(kind, 20_000);
  for (let p = 0; p < queries; p++) engine.addQuery(ofProject(p));
  // A commit costs milliseconds with 10,000 queries: few at a time.
  return replay(engine, cycle(singles(2000, 20_000)), 20);
}

function plans(kind) {
  const engine = items(kind, 20_000);
  for (let k = 0; k < 10; k++) {
    for (let i = 0; i < 1000; i++) {
      const where = i % 2 === 0
        ? simple('project_id', '=', `p${Math.floor((i + k * 1000) / 2)}`)
        : simple('rank', '>', 10_000_000 + i + k);
      engine.addQuery({table: 'item', orderBy: byId, limit: 1000 + i, where});
    }
  }
  return replay(engine, cycle(singles(2000, 20_000)), 20);
}

function window(kind) {
  const ROWS = 100_000;
  const engine = items(kind, ROWS);
  const rows = engine.addQuery({table: 'item', orderBy: [['rank', 'desc'], ['id', 'asc']], limit: 100});
  if (rows !== 100) throw new Error(`${rows} rows in the window`);
  const write = n => n % 2 === 0
    ? [ROWS - 1 - ((n * 31) % 200), ROWS - ((n * 7919) % 400)]
    : [(n * 61) % (ROWS - 200), (n * 7919) % (ROWS - 400)];
  return replay(engine, cycle(Array.from({length: 1999}, (_, i) => [write(i + 1)])), 100);
}

function transaction(kind) {
  const QUERIES = 1000;
  const engine = items(kind, QUERIES * ITEMS);
  for (let p = 0; p < QUERIES; p++) engine.addQuery(ofProject(p));
  const writes = [1, 2].map(n => Array.from({length: 10_000}, (_, i) => [i * 5, n]));
  return replay(engine, cycle(writes), 1);
}

const related = (field, subquery) =>
  [{correlation: {parentField: ['id'], childField: [field]}, subquery, system: 'client'}];
const tree = {
  table: 'project', orderBy: byId, where: simple('org', '=', '0'),
  related: related('project', {
    table: 'item', alias: 'items', orderBy: [['rank', 'desc']],
    related: related('item', {table: 'comment', alias: 'comments', orderBy: [['created', 'asc']]}),
  }),
};
const TREE_ROWS = 10_000;
const columns = parent => ['id', parent, 'title', 'rank', 'open', 'created', 'body'];

function treeServer(file) {
  return new Server(file, clientSchema(
    {project: columns('org'), item: columns('project'), comment: columns('item')}));
}

function complete(rows) {
  if (rows !== TREE_ROWS) throw new Error(`${rows} rows, not ${TREE_ROWS}`);
  return rows;
}

// With connections, statements and an engine of its own each time.
function cold() {
  const file = copy('tree.db');
  const run = () => {
    const engine = treeServer(file);
    const rows = complete(engine.addQuery(tree));
    engine.close();
    return rows;
  };
  return {run, close() {}};
}

// The same query once more beside the first one, in the same client group.
function second() {
  const engine = treeServer(copy('tree.db'));
  complete(engine.addQuery(tree));
  const run = () => complete(engine.addQuery(tree));
  // Pipelines that heap up would slow each other down.
  const after = () => {
    engine.removeQueries();
    complete(engine.addQuery(tree));
  };
  return {run, after, close: () => engine.close()};
}

// Parents of which only some children are read.
const PARENTS = 1000;
const ofParents = query => () => {
  const file = copy('families.db');
  const engine = new Server(file, clientSchema({item: columns('project'), comment: columns('item')}));
  const run = () => {
    const rows = engine.addQuery({table: 'item', orderBy: byId, where: simple('project', '=', '0'), ...query});
    if (rows !== PARENTS * 4) throw new Error(`${rows} rows of ${PARENTS} parents`);
    return PARENTS;
  };
  return {run, after: () => engine.removeQueries(), close: () => engine.close()};
};
const limited = ofParents({
  related: related('item', {table: 'comment', alias: 'comments', orderBy: [['created', 'desc']], limit: 3}),
});
const evidence = ofParents({where: {type: 'and', conditions: [simple('project', '=', '0'), {
  type: 'correlatedSubquery', op: 'EXISTS',
  related: related('item', {table: 'comment', alias: 'zsubq_comments'})[0],
}]}});

const BENCHES = [
  ['sqlite/hydrate-cold', 'row', cold],
  ['sqlite/hydrate-second', 'row', second],
  ['sqlite/hydrate-limited', 'parent', limited],
  ['sqlite/hydrate-evidence', 'parent', evidence],
  ...['sqlite', 'memory'].flatMap(kind => [
    [`${kind}/route-1k`, 'commit', () => route(kind, 1000)],
    [`${kind}/route-10k`, 'commit', () => route(kind, 10_000)],
    [`${kind}/plans-1k`, 'commit', () => plans(kind)],
    [`${kind}/window-100k`, 'commit', () => window(kind)],
    [`${kind}/transaction`, '10,000 rows', () => transaction(kind)],
  ]),
];

// --- Measuring: as ../src/main.rs does it.

const ROUNDS = 5;
const ROUND_NS = 200e6;
const WARM_UP_NS = 1e9;

const wall = () => Number(process.hrtime.bigint());
// Nanoseconds that the main thread had a CPU (Linux).
function cpu() {
  try {
    return Number(readFileSync('/proc/self/schedstat', 'utf8').split(' ')[0]);
  } catch {
    return Number.NaN;
  }
}

// Runs for `least` at least; wall and CPU time per unit. What `after` takes is not counted.
function round(bench, least) {
  const begin = [wall(), cpu()];
  const leftOut = [0, 0];
  let units = 0;
  do {
    units += bench.run();
    if (bench.after) {
      const [w, c] = [wall(), cpu()];
      bench.after();
      leftOut[0] += wall() - w;
      leftOut[1] += cpu() - c;
    }
  } while (wall() - begin[0] - leftOut[0] < least);
  return [(wall() - begin[0] - leftOut[0]) / units, (cpu() - begin[1] - leftOut[1]) / units];
}

for (const [name, unit, make] of BENCHES) {
  if (!name.includes(filter)) continue;
  const bench = make();
  round(bench, WARM_UP_NS);
  const rounds = Array.from({length: ROUNDS}, () => round(bench, ROUND_NS));
  bench.close();
  // NaN becomes null.
  const [wall_ns, cpu_ns] = [0, 1].map(i => rounds.map(r => r[i]));
  console.log(JSON.stringify({name, unit, wall_ns, cpu_ns}));
}
