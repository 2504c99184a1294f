package main

import (
	"fmt"
	"image/color"
	"math"
	"os"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// A picture is one column of a phase against the number of volumes.
type picture struct {
	file, phase, column, title, unit string
	scale                            float64 // of a value
	variants                         bool    // KMS far away and cold caches have lines of their own
}

var plots = []picture{
	{"reboot.svg", "reboot", "seconds", "Reboot: time until all volumes are mounted", "seconds, emulated", 1, true},
	{"first-boot.svg", "first boot", "seconds", "First boot: time until all volumes are made and mounted", "seconds, emulated", 1, true},
	{"cpu.svg", "reboot", "cpu_seconds", "Reboot: CPU time of the whole machine", "seconds, emulated", 1, false},
	{"memory.svg", "reboot", "sum_kib", "Reboot: peak memory of all processes together", "MiB", 1024, false},
}

// A look is how a subject is drawn, in all plots alike.
type look struct {
	colour color.RGBA
	shape  draw.GlyphDrawer
	dashes []vg.Length
}

// looks are of subjects without variants. The colours also differ in lightness (Okabe and Ito, "Color Universal Design", 2008).
var looks = map[string]look{
	floor:          {color.RGBA{0, 0, 0, 255}, draw.CrossGlyph{}, nil},
	floorKMS:       {color.RGBA{120, 120, 120, 255}, draw.PlusGlyph{}, nil},
	agent:          {color.RGBA{213, 94, 0, 255}, draw.CircleGlyph{}, nil},
	serial:         {color.RGBA{86, 180, 233, 255}, draw.BoxGlyph{}, nil},
	parallel:       {color.RGBA{0, 114, 178, 255}, draw.SquareGlyph{}, nil},
	systemd:        {color.RGBA{0, 158, 115, 255}, draw.TriangleGlyph{}, nil},
	clevis:         {color.RGBA{230, 159, 0, 255}, draw.PyramidGlyph{}, nil},
	cryptsetupsOwn: {color.RGBA{204, 121, 167, 255}, draw.RingGlyph{}, nil},
}

// variants are what a subject's name may end with: the subject under other circumstances.
var variants = map[string][]vg.Length{
	", KMS 20 ms away":  {vg.Points(6), vg.Points(2)},
	", KMS 100 ms away": {vg.Points(2), vg.Points(2)},
	", cold caches":     {vg.Points(8), vg.Points(2), vg.Points(1), vg.Points(2)},
}

// lookOf is the subject's own, dashed where it is a variant.
func lookOf(subject string) (look, bool) {
	for suffix, dashes := range variants {
		if name, ok := strings.CutSuffix(subject, suffix); ok {
			l, known := looks[name]
			l.dashes = dashes
			return l, known
		}
	}
	l, known := looks[subject]
	return l, known
}

// spreads are points with the least and the most of each.
type spreads struct {
	plotter.XYs
	plotter.YErrors
}

// steps are the ticks of a logarithmic axis: 1, 2, 5, 10 …
func steps(low, high float64) []plot.Tick {
	var ticks []plot.Tick
	for decade := math.Pow(10, math.Floor(math.Log10(low))); decade <= high; decade *= 10 {
		for _, step := range []float64{1, 2, 5} {
			if v := decade * step; v >= low && v <= high {
				ticks = append(ticks, plot.Tick{Value: v, Label: strconv.FormatFloat(v, 'g', 3, 64)})
			}
		}
	}
	return ticks
}

func (r *results) plot(pic picture, file string) error {
	p := plot.New()
	p.BackgroundColor = color.White
	p.Title.Text = pic.title + "\nmedian of the rounds; bars from the least to the most"
	p.X.Label.Text, p.Y.Label.Text = "volumes (logarithmic)", pic.unit+" (logarithmic)"
	p.Title.TextStyle.Font.Size, p.X.Label.TextStyle.Font.Size, p.Y.Label.TextStyle.Font.Size = 14, 12, 12
	p.Title.Padding = vg.Points(8)
	var ticks []plot.Tick
	for _, n := range r.volumes {
		ticks = append(ticks, plot.Tick{Value: float64(n), Label: strconv.Itoa(n)})
	}
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.ConstantTicks(ticks)
	p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.TickerFunc(steps)
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = color.Gray{225}, color.Gray{225}
	p.Add(grid)
	legend := plot.NewLegend()
	legend.Top, legend.Left = true, true
	legend.TextStyle.Font.Size, legend.Padding, legend.ThumbnailWidth = 10, vg.Points(3), vg.Points(36)
	for _, s := range r.subjects[pic.phase] {
		l, known := lookOf(s)
		if !known {
			return fmt.Errorf("subject %q has no colour", s)
		}
		if l.dashes != nil && !pic.variants {
			continue
		}
		var data spreads
		for _, n := range r.volumes {
			if low, m, high, ok := r.spread(point{pic.phase, s, n}, pic.column); ok && m > 0 {
				data.XYs = append(data.XYs, plotter.XY{X: float64(n), Y: m / pic.scale})
				data.YErrors = append(data.YErrors, struct{ Low, High float64 }{(m - low) / pic.scale, (high - m) / pic.scale})
			}
		}
		if len(data.XYs) == 0 {
			continue
		}
		line, points, err := plotter.NewLinePoints(data.XYs)
		if err != nil {
			return err
		}
		bars, err := plotter.NewYErrorBars(data)
		if err != nil {
			return err
		}
		line.Color, points.Color, bars.Color = l.colour, l.colour, l.colour
		line.Width, line.Dashes = vg.Points(1.5), l.dashes
		points.Shape, points.Radius = l.shape, vg.Points(3.5)
		p.Add(line, points, bars)
		legend.Add(s, line, points)
	}
	// Room at both sides, as wide for one number of volumes as for six.
	p.X.Min, p.X.Max = p.X.Min/1.15, p.X.Max*1.15
	p.Y.Min, p.Y.Max = p.Y.Min/1.2, p.Y.Max*1.2

	const width, height, beside = 11.5 * vg.Inch, 6 * vg.Inch, 3.8 * vg.Inch
	c := vgsvg.New(width, height)
	whole := draw.New(c)
	p.Draw(draw.Crop(whole, vg.Points(8), -beside, vg.Points(6), 0))
	legend.Draw(draw.Crop(whole, width-beside+vg.Points(10), 0, 0, -vg.Points(50)))
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if _, err := c.WriteTo(f); err != nil {
		return err
	}
	return f.Close()
}
