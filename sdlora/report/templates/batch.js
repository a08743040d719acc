for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const head = button.closest('th'), body = head.closest('table').tBodies[0];
  const column = [...head.parentNode.children].indexOf(head), up = head.getAttribute('aria-sort') !== 'ascending';
  for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const of = (row) => row.children[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    if (of(a) === '' || of(b) === '') return (of(a) === '') - (of(b) === '');
    const [x, y] = [Number(of(a)), Number(of(b))];
    const order = Number.isNaN(x) || Number.isNaN(y) ? of(a).localeCompare(of(b)) : x - y;
    return up ? order : -order;
  });
  body.append(...rows);
});
