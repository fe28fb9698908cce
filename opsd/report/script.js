'use strict';
// What answers to a hand on the drawn page: the charts' values at a step, and the token view. Text from a run only ever
// becomes text nodes.

const DATA = JSON.parse(document.getElementById('data').textContent);
const find = selector => document.querySelector(selector);
const unknown = value => value === null || value === undefined;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function number(value, digits = 4) {
  if (unknown(value)) return '–';
  if (value && Math.abs(value) < 1e-3) return value.toExponential(2);
  return value.toLocaleString('en', {maximumSignificantDigits: Math.abs(value) < 1000 ? digits : 5});
}

// ---- charts: one slider of the steps for all

const slider = find('#step');
const [first, last] = [slider.min, slider.max].map(Number);
const cells = [...document.querySelectorAll('.chart')].map(chart => chart.querySelectorAll('.values b'));

// The value of the point nearest to `step`, which is the step itself unless only some of many steps are drawn.
function valueAt(points, step) {
  const off = point => Math.abs(point[0] - step);
  const nearest = points.reduce((best, point) => (off(point) < off(best) ? point : best));
  return off(nearest) <= (last - first) / 100 ? nearest[1] : null;
}

function showStep(step) {
  slider.value = step;
  const shown = slider.valueAsNumber;
  find('output').textContent = `step ${shown.toLocaleString('en')}`;
  find('.charts').style.setProperty('--step', `${100 * (shown - first) / (last - first)}%`);
  DATA.charts.forEach((lines, i) => lines.forEach((points, j) => {
    cells[i][j].textContent = number(valueAt(points, shown));
  }));
}

slider.addEventListener('input', () => showStep(slider.value));
for (const plot of document.querySelectorAll('.chart .plot')) {
  plot.addEventListener('pointermove', event => {
    const axis = plot.querySelector('.axis').getBoundingClientRect();
    showStep(first + (event.clientX - axis.left) / axis.width * (last - first));
  });
}

// ---- token view

const NOTABLE = 0.05;  // nats from which it is a disagreement
const STRONG = 0.5;  // nats at which the colour is full
const VERDICT = {less: 'The teacher likes it less', more: 'The teacher likes it more', same: 'Both like it alike'};
const nats = d => (unknown(d) ? '∞' : number(d, 3));
const SIGNS = {'\n': '↵', '\t': '⇥', ' ': '␣'};
const visible = text => text?.replace(/[\n\t ]/g, space => SIGNS[space]) || '(no text of its own)';

function tokenView() {
  const [pick, text, card] = ['select', '.tokens', 'aside'].map(tag => find(`#token-view ${tag}`));
  let tokens = [];  // each with its `span`
  let chosen = 0;

  function read([word, id, student, teacher, divergence, alternatives, dominant], i) {
    // Within 5 % of each other it is neither; an infinite divergence is recorded as null.
    const ratio = unknown(student) || unknown(teacher) ? 0 : Math.log((teacher + 1e-12) / (student + 1e-12));
    const kind = ratio < -0.05 ? 'less' : ratio > 0.05 ? 'more' : 'same';
    const strength = Math.sqrt(Math.min(1, Math.max(0, divergence ?? Infinity) / STRONG));
    const both = `student ${number(student, 3)}, teacher ${number(teacher, 3)}`;
    const span = element('span', {
      class: `tok ${kind}`, style: `--strength:${strength.toFixed(3)}`, tabindex: -1, role: 'option', 'data-i': i,
      'aria-selected': false,
      'aria-label': `${visible(word)}: ${both}, divergence ${nats(divergence)} nats. ${VERDICT[kind]}.`,
    }, word === '' ? '·' : (word ?? '').replace(/\n/g, '↵\n'));
    const notable = (divergence ?? Infinity) >= NOTABLE;
    return {word, id, student, teacher, divergence, alternatives, dominant, kind, notable, span};
  }

  function open() {
    const {about, problem, rollout, of, view} = DATA.samples[pick.value];
    tokens = view.map(read);
    find('.about').textContent = about + (of > view.length ? ` · the first ${view.length} tokens shown` : '');
    find('.problem').textContent = problem;
    card.hidden = !view.length;
    text.setAttribute('role', view.length ? 'listbox' : 'group');
    text.replaceChildren(...(view.length ? tokens.map(token => token.span) : [rollout]));
    chosen = 0;
    if (view.length) choose(Math.max(0, tokens.findIndex(token => token.notable)), false);
  }

  function choose(i, focus = true) {
    for (const [token, is] of [[tokens[chosen], false], [tokens[i], true]]) {
      token.span.tabIndex = is ? 0 : -1;
      token.span.setAttribute('aria-selected', is);
    }
    chosen = i;
    if (focus) tokens[i].span.focus();
    show(i);
  }

  // The next disagreement in a direction, beyond the end from the other end on.
  function disagreement(direction) {
    const count = tokens.length;
    const order = tokens.map((_, i) => (chosen + direction * (i + 1) + count) % count);
    const next = order.find(i => tokens[i].notable);
    if (next !== undefined) choose(next);
  }

  function row(word, student, teacher, sampled) {
    const cell = (who, p) => element('td', {},
      element('i', {class: `meter ${who}`, style: `--share:${p ?? 0}`, 'aria-hidden': true}), number(p, 3));
    const head = element('th', {scope: 'row'}, element('code', {}, visible(word)), sampled ? ' sampled' : '');
    return element('tr', {}, head, cell('student', student), cell('teacher', teacher));
  }

  function show(i) {
    const {word, id, student, teacher, divergence, alternatives, dominant, kind} = tokens[i];
    const write = (selector, words) => { card.querySelector(selector).textContent = words; };
    text.querySelector('.shown')?.classList.remove('shown');
    tokens[i].span.classList.add('shown');
    write('.place', `token ${(i + 1).toLocaleString('en')} of ${tokens.length.toLocaleString('en')}, id ${id ?? '?'}`);
    write('.word', visible(word));
    write('.verdict', VERDICT[kind]);
    write('.divergence', nats(divergence));
    const [entry, term, s, t] = dominant ?? [];
    write('.dominant', dominant ? `in all; the largest term, ${nats(term)}, is that of ${visible(entry)} ` +
      `(student ${number(s, 3)}, teacher ${number(t, 3)})` : '');
    const others = (alternatives ?? []).filter(([other]) => other !== word);
    card.querySelector('tbody').replaceChildren(
      row(word, student, teacher, true), ...others.map(([other, ...p]) => row(other, ...p, false)));
  }

  const on = (kind, action) => text.addEventListener(kind, event => {
    const token = event.target.closest('[data-i]');
    if (token) action(Number(token.dataset.i), event);
  });
  on('pointermove', i => show(i));
  on('click', i => choose(i));
  on('focusin', i => choose(i, false));
  on('keydown', (i, event) => {
    const end = tokens.length - 1;
    const move = {
      ArrowLeft: () => choose(Math.max(0, i - 1)), ArrowRight: () => choose(Math.min(end, i + 1)),
      ArrowUp: () => disagreement(-1), ArrowDown: () => disagreement(1), Home: () => choose(0), End: () => choose(end),
    }[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move();
  });
  text.addEventListener('pointerleave', () => { if (tokens.length) show(chosen); });
  pick.addEventListener('change', open);
  find('#token-view button').addEventListener('click', () => disagreement(1));
  open();
}

for (const hidden of document.querySelectorAll('.script')) hidden.classList.remove('script');
if (find('#token-view')) tokenView();
