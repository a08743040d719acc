// The little that Gradio does not do: captions saved as they are written, images laid over one another, whole folders,
// addresses of pages, and the way from a preview to its comparison. Everything listens on the document, since Gradio
// replaces what is shown.
(() => {
  // Until the studio has told what was left here the last time, a choice could be overwritten. It lifts this itself.
  document.body.inert = true;
  setTimeout(() => { document.body.inert = false; }, 20000);

  const waiting = new Map();

  const send = (method, path, content) =>
    fetch(path, { method, headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(content) });

  const tell = (card, words, wrong) => {
    const place = card.querySelector('.saved');
    place.textContent = words;
    place.classList.toggle('wrong', Boolean(wrong));
  };

  const refresh = () => document.querySelector('#refresh-set')?.click();

  const about = (card) => ({ set: card.dataset.set, picture: card.dataset.image });

  const save = async (area) => {
    clearTimeout(waiting.get(area));
    waiting.delete(area);
    const card = area.closest('.card');
    const caption = area.value;
    tell(card, 'Saving …');
    try {
      const answer = await send('PUT', '/studio/caption', { ...about(card), caption });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error);
      if (found.doctor) card.querySelector('.doctor').outerHTML = found.doctor;
      if (area.value === caption) tell(card, 'Saved');
      refresh();
    } catch (error) {
      tell(card, `Not saved: ${error.message}`, true);
    }
  };

  // A card belongs to one image of one set for as long as it exists: what is typed into it is never another image's.
  const key = (card) => JSON.stringify(about(card));

  const update = (card, fresh) => {
    for (const part of ['.photo', '.doctor']) {
      const [before, now] = [card, fresh].map((one) => one.querySelector(part));
      if (before.outerHTML !== now.outerHTML) before.replaceWith(now);
    }
    const [area, other] = [card, fresh].map((one) => one.querySelector('textarea'));
    area.readOnly = other.readOnly;
    const isTyped = waiting.has(area) || document.activeElement === area;
    if (!isTyped && area.value !== other.value) {
      area.value = other.value;
      tell(card, '');
    }
    return card;
  };

  document.addEventListener('sdlora:cards', ({ detail: { home, html } }) => {
    const list = home.querySelector('.cards');
    const source = document.createElement('template');
    source.innerHTML = html;
    const before = new Map([...list.children].map((card) => [key(card), card]));
    const cards = [...source.content.querySelectorAll('.card')].map((fresh) => {
      const card = before.get(key(fresh));
      before.delete(key(fresh));
      return card ? update(card, fresh) : fresh;
    });
    for (const gone of before.values()) {
      const area = gone.querySelector('textarea');
      if (waiting.has(area)) save(area);
      gone.remove();
    }
    // Moved only where it must be: a card that is moved loses the focus.
    cards.forEach((card, place) => {
      if (list.children[place] !== card) list.insertBefore(card, list.children[place] ?? null);
    });
  });

  document.addEventListener('input', (event) => {
    const area = event.target.closest?.('.sd .card textarea');
    if (area) {
      clearTimeout(waiting.get(area));
      waiting.set(area, setTimeout(() => save(area), 700));
      tell(area.closest('.card'), '');
    }
    if (event.target.closest?.('#search-settings')) search(event.target.value);
    const slider = event.target.closest?.('.sd .pair input[type=range]');
    if (slider) slider.closest('.pair').style.setProperty('--shown', `${slider.value}%`);
  });

  // Under More: only settings that a search finds. Groups are drawn when they are opened, so that is done first.
  document.addEventListener('focusin', (event) => {
    if (!event.target.closest?.('#search-settings')) return;
    document.querySelectorAll('.settings-group > button:not(.open)').forEach((button) => button.click());
  });
  const search = (text) => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const group of document.querySelectorAll('.settings-group')) {
      const blocks = [...group.querySelectorAll('.options .block[id^="set-"]')];
      for (const block of blocks) {
        const found = words.every((word) => block.textContent.toLowerCase().includes(word));
        block.classList.toggle('unmatched', !found);
      }
      group.classList.toggle('unmatched', blocks.length > 0 && blocks.every((block) => block.matches('.unmatched')));
    }
  };

  document.addEventListener('focusout', (event) => {
    if (waiting.has(event.target)) save(event.target);
  });

  // What was typed a moment ago is sent even if the page goes away.
  addEventListener('pagehide', () => {
    for (const area of waiting.keys()) {
      fetch('/studio/caption', {
        method: 'PUT', keepalive: true, headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify({ ...about(area.closest('.card')), caption: area.value }),
      });
    }
  });

  const takeOut = async (button) => {
    const card = button.closest('[data-image]');
    const answer = await send('DELETE', '/studio/picture', about(card));
    if (answer.ok) {
      document.querySelectorAll('.sd .card').forEach((other) => key(other) === key(card) && other.remove());
      refresh();
    } else {
      const found = await answer.json();
      const place = card.querySelector('.saved');
      if (place) tell(card, found.error, true);
      else button.textContent = found.error;
    }
  };

  const reveal = (id) => {
    const found = document.getElementById(id);
    if (!found) return false;
    document.querySelectorAll('.sd .pair.wanted').forEach((pair) => pair.classList.remove('wanted'));
    found.classList.add('wanted');
    found.scrollIntoView({ block: 'center' });
    return true;
  };

  // A preview leads to its comparison under Copy check. That page, and in it the epoch, are drawn only when chosen.
  const compare = (id) => {
    [...document.querySelectorAll('[role=tab]')].find((tab) => tab.textContent.trim() === 'Copy check')?.click();
    // A control that has just been drawn may not listen yet, so that it is asked until it has heard.
    let asked = 0;
    const seek = () => {
      const radio = document.querySelector(`#copy-epoch input[value="${id.split('-')[1]}"]`);
      if (radio && !radio.checked) radio.click();
      if (!reveal(id) && (asked += 1) < 150) setTimeout(seek, 200);
    };
    seek();
  };

  // Ctrl and Enter lead to the next caption, with Shift to the one before.
  document.addEventListener('keydown', (event) => {
    const area = event.target.closest?.('.sd .card textarea');
    if (!area || event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    const areas = [...document.querySelectorAll('.sd .card textarea')];
    const next = areas[areas.indexOf(area) + (event.shiftKey ? -1 : 1)];
    if (next) {
      next.focus();
      next.closest('.card').scrollIntoView({ block: 'nearest' });
    } else if (waiting.has(area)) save(area);
  });

  const removeTag = (button) => {
    const area = button.closest('.card').querySelector('textarea');
    if (area.readOnly) return;
    const tags = area.value.split(',').map((tag) => tag.trim()).filter(Boolean);
    area.value = tags.filter((tag) => tag !== button.dataset.tag).join(', ');
    waiting.set(area, 0);
    save(area);
  };

  // --- Whole folders -------------------------------------------------------------------------------------------------
  // They are sent as a zip, which keeps the names of folders inside: kohya's hold the repeats.

  const table = Array.from({ length: 256 }, (_, n) => {
    for (let bit = 0; bit < 8; bit += 1) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n >>> 0;
  });
  const checksum = (bytes) => {
    let found = 0xffffffff;
    for (const byte of bytes) found = table[(found ^ byte) & 0xff] ^ (found >>> 8);
    return (found ^ 0xffffffff) >>> 0;
  };

  // A zip of files as they are, uncompressed; each is given with its path.
  const zipped = async (files, told) => {
    const [parts, index] = [[], []];
    let offset = 0;
    for (const [number, [path, file]] of files.entries()) {
      told(`Reading ${number + 1} of ${files.length} …`);
      const name = new TextEncoder().encode(path);
      const sum = checksum(new Uint8Array(await file.arrayBuffer()));
      // What both headers of a file have in common: version, UTF-8 names, no compression, a date, sum and sizes.
      const common = new DataView(new ArrayBuffer(26));
      [20, 0x800, 0, 0, 0x21].forEach((value, place) => common.setUint16(2 * place, value, true));
      [sum, file.size, file.size].forEach((value, place) => common.setUint32(10 + 4 * place, value, true));
      common.setUint16(22, name.length, true);
      parts.push(Uint8Array.of(0x50, 0x4b, 3, 4), common.buffer, name, file);
      const rest = new DataView(new ArrayBuffer(14));
      rest.setUint32(10, offset, true);
      index.push(Uint8Array.of(0x50, 0x4b, 1, 2, 20, 0), common.buffer, rest.buffer, name);
      offset += 30 + name.length + file.size;
    }
    const end = new DataView(new ArrayBuffer(18));
    [0, 0, files.length, files.length].forEach((value, place) => end.setUint16(2 * place, value, true));
    end.setUint32(8, new Blob(index).size, true);
    end.setUint32(12, offset, true);
    return new Blob([...parts, ...index, Uint8Array.of(0x50, 0x4b, 5, 6), end.buffer], { type: 'application/zip' });
  };

  const filesOf = async (entry) => {
    if (entry.isFile) {
      return [[entry.fullPath.slice(1), await new Promise((done, failed) => entry.file(done, failed))]];
    }
    const reader = entry.createReader();
    const found = [];
    for (;;) {
      // It gives a hundred at a time.
      const some = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!some.length) break;
      for (const one of some) found.push(...await filesOf(one));
    }
    return found;
  };

  const sendFolder = async (files) => {
    const place = document.querySelector('#folder-status');
    const told = (words) => { place.textContent = words; };
    const shown = files.filter(([path]) => !path.split('/').some((part) => part.startsWith('.')));
    if (!shown.length) return told('There are no files in this folder.');
    if (shown.reduce((sum, [, file]) => sum + file.size, 0) > 4e9) return told('This folder is larger than 4 GB.');
    const input = document.querySelector('#drop input[type=file]');
    if (!input) return told('Another upload is still running. Try again when it has ended.');
    try {
      const zip = await zipped(shown, told);
      const carrier = new DataTransfer();
      carrier.items.add(new File([zip], 'folder.zip', { type: 'application/zip' }));
      input.files = carrier.files;
      input.dispatchEvent(new Event('change', { bubbles: true }));
      told('');
    } catch (error) {
      told(`The folder could not be read: ${error.message}`);
    }
  };

  document.addEventListener('drop', async (event) => {
    if (!event.target.closest?.('#drop')) return;
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    if (!entries.some((entry) => entry.isDirectory)) return;
    event.preventDefault();
    event.stopPropagation();
    sendFolder((await Promise.all(entries.map(filesOf))).flat());
  }, true);

  const chooseFolder = () => {
    const input = Object.assign(document.createElement('input'), { type: 'file', webkitdirectory: true });
    input.addEventListener('change', () => sendFolder([...input.files].map((file) => [file.webkitRelativePath, file])));
    input.click();
  };

  // --- News ----------------------------------------------------------------------------------------------------------
  // A tab at rest asks with a few bytes whether anything that it shows has changed, and only then for what that is.

  const EVERY_MS = 2000;
  let isAsking = false;
  const ask = async () => {
    const token = document.querySelector('#seen :is(input, textarea)')?.value;
    if (isAsking || document.hidden || !token) return;
    isAsking = true;
    try {
      const answer = await fetch(`/studio/news/${token}`);
      if (answer.status === 200) document.querySelector('#news')?.click();
    } catch {
      // The studio is away for a moment.
    } finally {
      isAsking = false;
    }
  };
  setInterval(ask, EVERY_MS);
  document.addEventListener('visibilitychange', ask);

  // --- Addresses -----------------------------------------------------------------------------------------------------

  const slug = (tab) => tab.textContent.trim().toLowerCase().replace(/ /g, '-');
  const tabs = () => [...document.querySelectorAll('#steps [role=tab]')];
  const follow = () => {
    const chosen = tabs().find((tab) => tab.ariaSelected === 'true');
    if (document.body.inert || !chosen || location.hash === `#${slug(chosen)}`) return;
    const address = `#${slug(chosen)}`;
    if (location.hash) history.pushState(null, '', address);
    else history.replaceState(null, '', address);
  };
  new MutationObserver(follow).observe(document.body, {
    subtree: true, attributes: true, attributeFilter: ['aria-selected', 'inert'],
  });
  addEventListener('popstate', () => tabs().find((tab) => `#${slug(tab)}` === location.hash)?.click());

  document.addEventListener('click', (event) => {
    const remove = event.target.closest?.('.sd button.remove');
    if (remove) takeOut(remove);
    const tag = event.target.closest?.('.sd .tag button');
    if (tag) removeTag(tag);
    if (event.target.closest?.('#whole-folder')) chooseFolder();
    const tile = event.target.closest?.('.sd .tile[href^="#pair-"]');
    if (tile) {
      event.preventDefault();
      compare(tile.hash.slice(1));
    }
  });
})();
