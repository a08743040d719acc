// An image stands in the page once; a slider moves the edge of the image above it; a link opens what is folded.
for (const image of document.querySelectorAll('img[data-same]'))
  image.src = document.getElementById(image.dataset.same).src;
for (const slider of document.querySelectorAll('.pair input[type=range]')) {
  const move = () => slider.closest('.pair').style.setProperty('--shown', slider.value + '%');
  slider.addEventListener('input', move);
  move();
}
const unfold = () => {
  const wanted = location.hash && document.getElementById(location.hash.slice(1));
  const folded = wanted && wanted.closest('details');
  if (folded && !folded.open) { folded.open = true; wanted.scrollIntoView(); }
};
addEventListener('hashchange', unfold);
unfold();
