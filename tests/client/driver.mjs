// Drives real Zero clients for the end-to-end tests: one JSON command per line on stdin, one JSON
// event per line on stdout. Run with the Node of the `node` package.
//
// Commands
//   {op:"open", client, server, schema, userID, storageKey?, mutators?}     a new Zero instance
//   {op:"mutate", client, name, args, id}                        call a custom mutator
//   {op:"watch", client, query, spec}                            materialise a query
//   {op:"unwatch", client, query}
//   {op:"fresh", client, query}                                  evaluate the query anew, locally
//   {op:"resume", client}                                        connect again after "refused"
//   {op:"close", client}                                         close the instance
// Events
//   {event:"ready"}                                              the driver started
//   {event:"view", client, query, complete, data}                on every change
//   {event:"fresh", client, query, data}                         answer to "fresh"
//   {event:"mutated", client, id, result}                        what the server made of "mutate"
//   {event:"closed", client}
//   {event:"lost", client}                                       the server does not know it or its
//                                                                group any more: it starts anew, as a
//                                                                page does
//   {event:"refused", client, reason}                            it stopped with an error, until "resume"
//   {event:"log", level, text}                                   client log, warnings and errors
//   {event:"failed", error, command}                             the command threw
import {createInterface} from 'node:readline';
import {
  boolean, createSchema, json, number, relationships, string, table, Zero,
} from '@rocicorp/zero';

/** Node says only `error` where no connection comes about, browsers `close` as well: without it the
 *  client waits ten seconds. */
globalThis.WebSocket = class extends WebSocket {
  constructor(...args) {
    super(...args);
    let closed = false;
    this.addEventListener('close', () => (closed = true));
    this.addEventListener('error', () =>
      setImmediate(() => {
        if (closed || this.readyState !== WebSocket.CONNECTING) return;
        const event = new Event('close');
        this.dispatchEvent(Object.assign(event, {code: 1006, reason: '', wasClean: false}));
      }),
    );
  }
};

const types = {string, number, boolean, json};
const clients = new Map();

function emit(event) {
  process.stdout.write(JSON.stringify(event, (_, v) => (v === undefined ? null : v)) + '\n');
}

/** {tables: {t: {columns: {c: type}, primaryKey: [c]}}, relationships: {t: {r: [hop…]}}}; a hop
 *  is {sourceField: [c], destField: [c], destTable: t}. All relationships are to-many. */
function buildSchema(spec) {
  const tables = Object.entries(spec.tables).map(([name, t]) => {
    const columns = {};
    for (const [c, type] of Object.entries(t.columns)) columns[c] = types[type]().optional();
    return table(name).columns(columns).primaryKey(...t.primaryKey);
  });
  const byName = Object.fromEntries(tables.map(t => [t.schema.name, t]));
  const rels = Object.entries(spec.relationships ?? {}).map(([name, edges]) =>
    relationships(byName[name], ({many}) =>
      Object.fromEntries(
        Object.entries(edges).map(([rel, hops]) => [
          rel,
          many(...hops.map(h => ({...h, destSchema: byName[h.destTable]}))),
        ]),
      ),
    ),
  );
  return createSchema({tables, relationships: rels, enableLegacyQueries: true});
}

/** {cmp: [column, op, value]} | {and: […]} | {or: […]} | {exists: rel, spec?, flip?} */
function condition(spec, eb) {
  if (spec.and) return eb.and(...spec.and.map(c => condition(c, eb)));
  if (spec.or) return eb.or(...spec.or.map(c => condition(c, eb)));
  if (spec.cmp) return eb.cmp(...spec.cmp);
  const options = spec.flip === undefined ? undefined : {flip: spec.flip};
  return eb.exists(spec.exists, q => refine(q, spec.spec ?? {}), options);
}

/** {where?, related?: [{rel, spec}], orderBy?: [[c, dir]], start?: {row, inclusive}, limit?} */
function refine(q, spec) {
  if (spec.where) q = q.where(eb => condition(spec.where, eb));
  for (const r of spec.related ?? []) q = q.related(r.rel, c => refine(c, r.spec ?? {}));
  for (const [column, direction] of spec.orderBy ?? []) q = q.orderBy(column, direction);
  if (spec.start) q = q.start(spec.start.row, {inclusive: spec.start.inclusive});
  if (spec.limit !== undefined) q = q.limit(spec.limit);
  return q;
}

/** Views hold rows with symbols for reference counts; plain JSON is what the tests compare. */
function plain(data) {
  return JSON.parse(JSON.stringify(data ?? null));
}

const log = {
  log(level, _context, ...args) {
    if (level === 'warn' || level === 'error') {
      emit({event: 'log', level, text: args.map(a => (a instanceof Error ? a.stack : typeof a === 'string' ? a : JSON.stringify(a))).join(' ')});
    }
  },
};

/** Custom mutators for any schema: the app's own run the same names. */
const mutators = {
  app: {
    async upsert(tx, {table, row}) {
      await tx.mutate[table].upsert(row);
    },
    /** Only the server refuses it. */
    async refused(tx, {table, row}) {
      await tx.mutate[table].upsert(row);
    },
  },
};

/** What a page does by loading itself again. */
function startAnew(client, state) {
  if (clients.get(client) !== state) return;
  emit({event: 'lost', client});
  state.zero.close();
  commands.open(state.options);
  for (const [query, {spec}] of state.views) commands.watch({client, query, spec});
}

const commands = {
  open(options) {
    const {client, server, schema, userID, storageKey, mutators: custom} = options;
    const state = {zero: undefined, views: new Map(), options};
    state.zero = new Zero({
      cacheURL: server,
      schema: buildSchema(schema),
      userID: userID ?? 'anon',
      storageKey,
      kvStore: 'mem',
      logLevel: 'warn',
      logSink: log,
      hiddenTabDisconnectDelay: 3_600_000,
      onClientStateNotFound: () => startAnew(client, state),
      onUpdateNeeded: () => startAnew(client, state),
      ...(custom ? {mutators} : {}),
    });
    clients.set(client, state);
    const {connection} = state.zero;
    connection.state.subscribe(now => {
      if (now.name !== 'error' || clients.get(client) !== state) return;
      emit({event: 'refused', client, reason: now.reason});
    });
  },
  watch({client, query, spec}) {
    const {zero, views} = clients.get(client);
    const view = zero.materialize(refine(zero.query[spec.table], spec), {ttl: spec.ttl ?? 'none'});
    const state = {view, spec};
    views.set(query, state);
    view.addListener((data, result, error) => {
      if (clients.get(client)?.zero !== zero) return;
      emit({event: 'view', client, query, complete: result === 'complete', data: plain(data), error: error ?? null});
    });
  },
  unwatch({client, query}) {
    const {views} = clients.get(client);
    views.get(query)?.view.destroy();
    views.delete(query);
  },
  async fresh({client, query}) {
    const {zero, views} = clients.get(client);
    const {spec} = views.get(query);
    const data = await zero.run(refine(zero.query[spec.table], spec)).catch(e => {
      if (clients.get(client)?.zero === zero) throw e;
    });
    if (data !== undefined) emit({event: 'fresh', client, query, data: plain(data)});
  },
  mutate({client, name, args, id}) {
    const {zero} = clients.get(client);
    zero.mutate.app[name](args).server.then(result =>
      emit({event: 'mutated', client, id, result: plain(result)}),
    );
  },
  resume({client}) {
    clients.get(client).zero.connection.connect();
  },
  async close({client}) {
    await clients.get(client).zero.close();
    clients.delete(client);
    emit({event: 'closed', client});
  },
};

for (const kind of ['uncaughtException', 'unhandledRejection']) {
  process.on(kind, e => emit({event: 'failed', error: String(e?.stack ?? e), command: kind}));
}
emit({event: 'ready'});
for await (const line of createInterface({input: process.stdin})) {
  if (!line.trim()) continue;
  const command = JSON.parse(line);
  try {
    await commands[command.op](command);
  } catch (e) {
    emit({event: 'failed', error: String(e?.stack ?? e), command});
  }
}
process.exit(0);
