// A sync-protocol client in one file: it connects, says which queries it wants, keeps the rows
// that the server pokes, and evaluates its queries over them. No build step, no dependency.
import {serverURL} from './config.js';

const schema = {
  user: {columns: {id: 'string', name: 'string', color: 'string'}, primaryKey: ['id']},
  issue: {
    columns: {
      id: 'string', title: 'string', status: 'string', priority: 'number', owner_id: 'string',
      created_at: 'number', updated_at: 'number',
    },
    primaryKey: ['id'],
  },
  comment: {
    columns: {
      id: 'string', issue_id: 'string', author_id: 'string', body: 'string', created_at: 'number',
    },
    primaryKey: ['id'],
  },
  label: {columns: {id: 'string', name: 'string', color: 'string'}, primaryKey: ['id']},
  issue_label: {
    columns: {issue_id: 'string', label_id: 'string'},
    primaryKey: ['issue_id', 'label_id'],
  },
};

// The schema as the protocol wants it.
const typed = columns => Object.fromEntries(Object.entries(columns).map(([c, type]) => [c, {type}]));
const wireSchema = Object.fromEntries(
  Object.entries(schema).map(([name, t]) => [name, {...t, columns: typed(t.columns)}]),
);

// ---- queries as ASTs -------------------------------------------------------------------------

const column = name => ({type: 'column', name});
const literal = value => ({type: 'literal', value});
const is = (name, op, value) => ({type: 'simple', op, left: column(name), right: literal(value)});
const and = conditions => ({type: 'and', conditions});
const edge = (parentField, childField, subquery) => ({
  system: 'client', correlation: {parentField: [parentField], childField: [childField]}, subquery,
});
const exists = (...args) => ({type: 'correlatedSubquery', op: 'EXISTS', related: edge(...args)});

const owner = edge('owner_id', 'id', {table: 'user', alias: 'owner'});
const labels = {
  ...edge('id', 'issue_id', {
    table: 'issue_label',
    alias: 'labels',
    related: [edge('label_id', 'id', {table: 'label', alias: 'label'})],
  }),
};
const hasLabel = name =>
  exists('id', 'issue_id', {
    table: 'issue_label',
    alias: 'zsubq_labels',
    where: exists('label_id', 'id', {
      table: 'label', alias: 'zsubq_label', where: is('name', '=', name),
    }),
  });

function recentQuery({status, label, owner: who}) {
  const conditions = [];
  if (status) conditions.push(is('status', '=', status));
  if (label) conditions.push(hasLabel(label));
  if (who) conditions.push(is('owner_id', '=', who));
  return {
    table: 'issue', where: and(conditions), related: [owner, labels],
    orderBy: [['updated_at', 'desc'], ['id', 'asc']], limit: 15,
  };
}
const detailQuery = id => ({
  table: 'issue',
  where: is('id', '=', id),
  related: [
    owner,
    edge('id', 'issue_id', {
      table: 'comment', alias: 'comments', orderBy: [['created_at', 'desc'], ['id', 'asc']], limit: 8,
      related: [edge('author_id', 'id', {table: 'user', alias: 'author'})],
    }),
  ],
});
const urgentQuery = {
  table: 'issue',
  where: and([is('priority', '=', 1), is('status', '!=', 'closed'), hasLabel('security')]),
  related: [owner], orderBy: [['updated_at', 'desc'], ['id', 'asc']], limit: 8,
};
const commentsQuery = {
  table: 'comment',
  where: exists('issue_id', 'id', {
    table: 'issue', alias: 'zsubq_issue', where: is('status', 'IN', ['open', 'in progress', 'review']),
  }),
  related: [
    edge('author_id', 'id', {table: 'user', alias: 'author'}),
    edge('issue_id', 'id', {table: 'issue', alias: 'issue'}),
  ],
  orderBy: [['created_at', 'desc'], ['id', 'asc']], limit: 8,
};

// ---- rows and their evaluation ---------------------------------------------------------------

const tables = Object.fromEntries(Object.keys(schema).map(t => [t, new Map()]));
const keyOf = (table, row) => schema[table].primaryKey.map(c => row[c]).join('\u0000');

const tests = {
  '=': (a, b) => a === b,
  '!=': (a, b) => a !== b,
  IN: (a, b) => b.includes(a),
};
function holds(condition, row) {
  if (condition.type === 'and') return condition.conditions.every(c => holds(c, row));
  if (condition.type === 'correlatedSubquery') return children(condition.related, row).length > 0;
  const value = row[condition.left.name];
  return value !== null && tests[condition.op](value, condition.right.value);
}
function children({correlation, subquery}, row) {
  const [parent, child] = [correlation.parentField[0], correlation.childField[0]];
  return evaluate(subquery, r => r[child] === row[parent]);
}
function evaluate(ast, joined = () => true) {
  const order = ast.orderBy ?? schema[ast.table].primaryKey.map(c => [c, 'asc']);
  const rows = [...tables[ast.table].values()]
    .filter(r => joined(r) && (!ast.where || holds(ast.where, r)))
    .sort((a, b) => {
      for (const [c, direction] of order) {
        if (a[c] !== b[c]) return (a[c] < b[c] ? -1 : 1) * (direction === 'asc' ? 1 : -1);
      }
      return 0;
    })
    .slice(0, ast.limit);
  return rows.map(row => ({
    ...row,
    ...Object.fromEntries((ast.related ?? []).map(r => [r.subquery.alias, children(r, row)])),
  }));
}

// ---- the connection --------------------------------------------------------------------------

const id = () => crypto.randomUUID().replaceAll('-', '');
// A group per page: its rows live in memory, so each load starts anew. The server still shares the
// results of equal queries among all groups.
const clientGroupID = id();
const clientID = id();
let cookie = null;
let socket;
let pokesSeen = 0;
let lag = null;
const wanted = new Map(); // hash → AST
const changed = new Set(); // row keys that the last poke touched
let poke = null;
let refusal = null; // what the server said before it closed the connection

function hash(ast) {
  let h = 2166136261;
  for (const ch of JSON.stringify(ast)) h = Math.imul(h ^ ch.codePointAt(0), 16777619);
  return 'q' + (h >>> 0).toString(36);
}
function patch(from, to) {
  const ops = [];
  for (const [h] of from) if (!to.has(h)) ops.push({op: 'del', hash: h});
  for (const [h, ast] of to) if (!from.has(h)) ops.push({op: 'put', hash: h, ast, ttl: 10_000});
  return ops;
}
function connect() {
  const init = ['initConnection', {
    desiredQueriesPatch: patch(new Map(), wanted),
    ...(cookie === null ? {clientSchema: {tables: wireSchema}} : {}),
  }];
  const bytes = new TextEncoder().encode(JSON.stringify({initConnectionMessage: init}));
  const header = encodeURIComponent(btoa(String.fromCharCode(...bytes)));
  const url = new URL('/sync/v51/connect', serverURL.replace(/^http/, 'ws'));
  url.search = new URLSearchParams({
    clientID, clientGroupID, baseCookie: cookie ?? '', ts: String(performance.now()), lmid: '0', wsid: id(),
  });
  socket = new WebSocket(url, header);
  socket.onmessage = e => receive(JSON.parse(e.data));
  socket.onopen = () => {
    refusal = null;
    show('state', 'live', 'live');
  };
  socket.onclose = () => {
    show('state', refusal ?? 'reconnecting', '');
    poke = null;
    setTimeout(connect, 1000);
  };
}
setInterval(() => socket?.readyState === WebSocket.OPEN && socket.send('["ping",{}]'), 5000);

function receive([type, body]) {
  if (type === 'pokeStart') poke = {...body, parts: []};
  else if (type === 'pokePart') poke?.parts.push(body);
  else if (type === 'pokeEnd') endPoke(body);
  else if (type === 'error') {
    refusal = `${body.kind}: ${body.message}`;
    if (body.kind === 'ClientNotFound') location.reload();
  }
}
function endPoke({cookie: next, cancel}) {
  const done = poke;
  poke = null;
  if (!done || cancel) return;
  if (done.baseCookie !== cookie) return socket.close();
  changed.clear();
  for (const part of done.parts) {
    for (const op of part.rowsPatch ?? []) {
      const rows = tables[op.tableName];
      if (!rows) continue;
      if (op.op === 'put') {
        const key = keyOf(op.tableName, op.value);
        rows.set(key, op.value);
        changed.add(op.tableName + key);
        const at = op.value.updated_at ?? op.value.created_at;
        // Rows of a query that is new here are not news.
        if (!part.gotQueriesPatch && Date.now() - at < 10_000) lag = Date.now() - at;
      } else rows.delete(keyOf(op.tableName, op.id));
    }
  }
  cookie = next;
  pokesSeen += 1;
  render();
}
function want(queries) {
  const next = new Map(queries.map(q => [hash(q), q]));
  const ops = patch(wanted, next);
  wanted.clear();
  for (const [h, q] of next) wanted.set(h, q);
  if (ops.length && socket?.readyState === WebSocket.OPEN) {
    socket.send(JSON.stringify(['changeDesiredQueries', {desiredQueriesPatch: ops}]));
  }
  render();
}

// ---- the page --------------------------------------------------------------------------------

const $ = name => document.getElementById(name);
const filters = {status: '', label: '', owner: ''};
let selected = 'i20000';

function show(name, text, className) {
  $(name).textContent = text;
  if (className !== undefined) $(name).className = className;
}
function element(tag, attributes, ...content) {
  const e = Object.assign(document.createElement(tag), attributes);
  e.append(...content);
  return e;
}
const fresh = (table, row) => (changed.has(table + keyOf(table, row)) ? 'fresh' : '');
const ago = ms => {
  const s = Math.max(0, Math.round((Date.now() - ms) / 1000));
  return s < 60 ? `${s} s ago` : s < 3600 ? `${Math.floor(s / 60)} min ago` : `${Math.floor(s / 3600)} h ago`;
};
const person = list => list?.[0]?.name ?? '…';

function describe(ast) {
  const say = c =>
    c.type === 'and' ? c.conditions.map(say).join('')
    : c.type === 'simple' ? `.where('${c.left.name}', '${c.op}', ${JSON.stringify(c.right.value)})`
    : `.whereExists('${c.related.subquery.table}'${c.related.subquery.where ? `, q => q${say(c.related.subquery.where)}` : ''})`;
  const parts = [ast.table, ast.where ? say(ast.where) : ''];
  for (const r of ast.related ?? []) parts.push(`.related('${r.subquery.alias}')`);
  for (const [c, d] of (ast.orderBy ?? []).slice(0, 1)) parts.push(`.orderBy('${c}', '${d}')`);
  if (ast.limit) parts.push(`.limit(${ast.limit})`);
  return parts.join('');
}

function render() {
  const recent = recentQuery(filters);
  show('zql-recent', describe(recent));
  $('recent').replaceChildren(
    ...evaluate(recent).map(issue =>
      element('tr', {className: fresh('issue', issue), onclick: () => choose(issue.id)},
        element('td', {title: issue.title}, issue.title, ' ', element('span', {className: 'meta'}, issue.id)),
        element('td', {}, issue.status),
        element('td', {}, 'P' + issue.priority),
        element('td', {}, person(issue.owner)),
        element('td', {}, ...issue.labels.flatMap(l => l.label).map(l =>
          element('span', {className: 'chip', style: `background:${l.color}`}, l.name))),
        element('td', {}, ago(issue.updated_at))))
  );
  const detail = detailQuery(selected);
  show('zql-detail', describe(detail));
  const [issue] = evaluate(detail);
  show('detail-title', issue?.title ?? 'An issue');
  $('detail').replaceChildren(
    ...(issue ? [
      element('p', {className: 'meta'}, `${issue.id} · ${issue.status} · P${issue.priority} · ${person(issue.owner)} · ${ago(issue.updated_at)}`),
      element('ol', {}, ...issue.comments.map(c => commentItem(c, ''))),
    ] : [])
  );
  show('zql-urgent', describe(urgentQuery));
  $('urgent').replaceChildren(...evaluate(urgentQuery).map(i =>
    element('li', {className: fresh('issue', i), onclick: () => choose(i.id)},
      i.title, element('div', {className: 'meta'}, `${i.id} · ${i.status} · ${person(i.owner)} · ${ago(i.updated_at)}`))));
  show('zql-comments', describe(commentsQuery));
  $('comments').replaceChildren(...evaluate(commentsQuery).map(c => commentItem(c, ` on ${c.issue?.[0]?.title ?? '…'}`)));
  show('rows', Object.values(tables).reduce((n, t) => n + t.size, 0).toLocaleString('en'));
  show('cookie', cookie ?? '–');
  show('lag', lag === null ? '–' : `${Math.max(0, Math.round(lag))} ms`);
}
function commentItem(c, where) {
  return element('li', {className: fresh('comment', c)}, c.body,
    element('div', {className: 'meta'}, `${person(c.author)}${where} · ${ago(c.created_at)}`));
}
function choose(issueID) {
  selected = issueID;
  update();
}
function update() {
  want([
    recentQuery(filters), detailQuery(selected), urgentQuery, commentsQuery,
    {table: 'label', orderBy: [['name', 'asc'], ['id', 'asc']]},
    {table: 'user', orderBy: [['name', 'asc'], ['id', 'asc']], limit: 40},
  ]);
  setTimeout(fillFilters, 300);
}
function fillFilters() {
  const fill = (name, options) => {
    const select = document.forms.filters.elements[name];
    if (select.options.length === options.length + 1) return;
    select.replaceChildren(element('option', {value: ''}, 'any'),
      ...options.map(([value, text]) => element('option', {value}, text)));
    select.value = filters[name];
  };
  fill('status', ['open', 'in progress', 'review', 'closed'].map(s => [s, s]));
  fill('label', evaluate({table: 'label', orderBy: [['name', 'asc']]}).map(l => [l.name, l.name]));
  fill('owner', evaluate({table: 'user', orderBy: [['name', 'asc']]}).map(u => [u.id, u.name]));
}
document.forms.filters.onchange = e => {
  filters[e.target.name] = e.target.value;
  update();
};

update();
connect();
setInterval(() => {
  show('pokes', String(pokesSeen));
  pokesSeen = 0;
  fillFilters();
}, 1000);
