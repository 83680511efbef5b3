// A slider over pictures that were drawn beforehand: no kernel is needed, and the keyboard moves it.
document.addEventListener('DOMContentLoaded', () => {
  for (const box of document.querySelectorAll('.frames')) {
    const img = box.querySelector('img'), controls = [...box.querySelectorAll('input, select')], root = box.dataset.root
    const at = c => c.type === 'range' ? +c.value : c.selectedIndex
    const words = c => JSON.parse(c.dataset.words)[at(c)]
    const file = where => root + where.join('-') + '.png'
    const show = () => {
      for (const c of controls) if (c.type === 'range') { c.setAttribute('aria-valuetext', words(c)); c.nextElementSibling.textContent = words(c) }
      const where = controls.map(at)
      img.src = file(where)
      img.alt = box.dataset.alt + ': ' + controls.map(c => c.name + ' ' + words(c)).join(', ')
      controls.forEach((c, i) => { for (const d of [-1, 1]) {                    // the neighbours are fetched before they are wanted
        const n = where[i] + d
        if (n >= 0 && n < JSON.parse(c.dataset.words).length) new Image().src = file(where.map((w, j) => j === i ? n : w)) } })
    }
    for (const c of controls) c.addEventListener('input', show)
    show()
  }
})
