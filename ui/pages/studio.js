// The little that Gradio does not do: captions saved as they are written, images laid over one another, and the
// way from a preview to its comparison. Everything listens on the document, since Gradio replaces what is shown.
(() => {
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

  document.addEventListener('click', (event) => {
    const remove = event.target.closest?.('.sd button.remove');
    if (remove) takeOut(remove);
    const tile = event.target.closest?.('.sd .tile[href^="#pair-"]');
    if (tile) {
      event.preventDefault();
      compare(tile.hash.slice(1));
    }
  });
})();
